//! Generates the clients and servers of the leads' gRPC doors from their description; messages are our own serde types.
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
    let renew = tonic_build::manual::Method::builder()
        .name("renew")
        .route_name("Renew")
        .input_type("crate::join::RenewRequest")
        .output_type("crate::join::Certificate")
        .codec_path("netmanager_api::codec::JsonCodec")
        .build();
    let renewals = tonic_build::manual::Service::builder()
        .name("RenewDoor")
        .package("weft.agent.v1")
        .comment("A lead's door for agents whose certificate ends.")
        .method(renew)
        .build();
    let join = tonic_build::manual::Method::builder()
        .name("join")
        .route_name("Join")
        .input_type("crate::join::JoinRequest")
        .output_type("crate::join::Joined")
        .codec_path("netmanager_api::codec::JsonCodec")
        .build();
    let joins = tonic_build::manual::Service::builder()
        .name("JoinDoor")
        .package("weft.join.v1")
        .comment("A lead's door for clusters that join by a token.")
        .method(join)
        .build();
    tonic_build::manual::Builder::new().compile(&[door, renewals, joins]);
}
