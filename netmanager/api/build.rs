//! Generates the client and server of the agent stream from its description; messages are our own serde types.
fn main() {
    if std::env::var_os("CARGO_FEATURE_STREAM").is_none() {
        return;
    }
    let follow = tonic_build::manual::Method::builder()
        .name("follow")
        .route_name("Follow")
        .input_type("crate::stream::FromNode")
        .output_type("crate::stream::ToNode")
        .codec_path("crate::codec::JsonCodec")
        .client_streaming()
        .server_streaming()
        .build();
    let door = tonic_build::manual::Service::builder()
        .name("NodeDoor")
        .package("weft.node.v1")
        .comment("An agent's door for the NetManagers of its cluster.")
        .method(follow)
        .build();
    tonic_build::manual::Builder::new().compile(&[door]);
}
