//! The committed generated code equals what the .proto says.
//!
//! After a change of the .proto: `SWITCHTOWER_UPDATE=1 cargo test -p switchtower-proto --test generated`.

use std::path::Path;

#[test]
fn generated_code_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let descriptors =
        protox::compile([root.join("proto/switchtower/v1/fleet.proto")], [root.join("proto")]).unwrap();
    tonic_prost_build::configure()
        .build_transport(false)
        .client_mod_attribute(".", "#[cfg(feature = \"grpc\")]")
        .server_mod_attribute(".", "#[cfg(feature = \"grpc\")]")
        // Keys of maps in core and in the agent.
        .type_attribute(".switchtower.v1.ServicePort", "#[derive(PartialOrd, Ord)]")
        .type_attribute(".switchtower.v1.PoolKey", "#[derive(PartialOrd, Ord)]")
        .type_attribute(".switchtower.v1.Endpoint", "#[derive(PartialOrd, Ord)]")
        .type_attribute(".switchtower.v1.FrontendKey", "#[derive(PartialOrd, Ord)]")
        .type_attribute(".switchtower.v1.LocalEndpoint", "#[derive(PartialOrd, Ord)]")
        .type_attribute(".switchtower.v1.HealthCheckKey", "#[derive(PartialOrd, Ord)]")
        .type_attribute(".switchtower.v1.Cidr", "#[derive(PartialOrd, Ord)]")
        // Encoded once, sent to many nodes: shared, not copied.
        .bytes(".switchtower.v1.Part.payload")
        .out_dir(out.path())
        .compile_fds(descriptors)
        .unwrap();
    let fresh = std::fs::read_to_string(out.path().join("switchtower.v1.rs")).unwrap();
    let committed = root.join("src/gen/switchtower.v1.rs");
    if std::env::var_os("SWITCHTOWER_UPDATE").is_some() {
        std::fs::write(&committed, &fresh).unwrap();
    }
    assert!(
        std::fs::read_to_string(&committed).unwrap_or_default() == fresh,
        "src/gen is stale: run SWITCHTOWER_UPDATE=1 cargo test -p switchtower-proto --test generated"
    );
}
