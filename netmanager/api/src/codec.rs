//! JSON messages inside gRPC frames: the framing, flow control and multiplexing are gRPC's, the types are ours.
//!
//! Length prefixes, message limits and cancellation belong to tonic; this maps one frame to one serde value.

use std::marker::PhantomData;

use bytes::{Buf, BufMut};
use serde::{Serialize, de::DeserializeOwned};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// Encodes `T` and decodes `U` as JSON.
#[derive(Debug)]
pub struct JsonCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for JsonCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

/// The sending half of [`JsonCodec`].
#[derive(Debug)]
pub struct JsonEncoder<T>(PhantomData<T>);

/// The receiving half of [`JsonCodec`].
#[derive(Debug)]
pub struct JsonDecoder<U>(PhantomData<U>);

impl<T, U> Codec for JsonCodec<T, U>
where
    T: Serialize + Send + 'static,
    U: DeserializeOwned + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = JsonEncoder<T>;
    type Decoder = JsonDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        JsonEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        JsonDecoder(PhantomData)
    }
}

impl<T: Serialize> Encoder for JsonEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        serde_json::to_writer(buffer.writer(), &item)
            .map_err(|error| Status::internal(format!("failed to encode a message: {error}")))
    }
}

impl<U: DeserializeOwned> Decoder for JsonDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        if !buffer.has_remaining() {
            return Ok(None);
        }
        serde_json::from_reader(buffer.reader())
            .map(Some)
            .map_err(|error| {
                Status::invalid_argument(format!("failed to decode a message: {error}"))
            })
    }
}
