//! Generates the client and server of the agent stream from its description; messages are our own serde types.
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let follow = tonic_build::manual::Method::builder()
        .name("follow")
        .route_name("Follow")
        .input_type("crate::stream::FromAgent")
        .output_type("crate::stream::ToAgent")
        .codec_path("netmanager_api::codec::JsonCodec")
        .client_streaming()
        .server_streaming()
        .build();
    let door = tonic_build::manual::Service::builder()
        .name("LeadDoor")
        .package("weft.agent.v1")
        .comment("A lead's door for the agents of the mesh.")
        .method(follow)
        .build();
    tonic_build::manual::Builder::new().compile(&[door]);
}
