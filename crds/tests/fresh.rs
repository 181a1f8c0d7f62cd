//! The committed CRDs match the types.

use std::path::Path;

#[test]
fn yaml_is_up_to_date() {
    for (file, definition) in switchtower_crds::all() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("yaml").join(file);
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == switchtower_crds::yaml(&definition).unwrap(),
            "{file} is out of date: run `cargo run -p switchtower-crds --bin crdgen`"
        );
    }
}
