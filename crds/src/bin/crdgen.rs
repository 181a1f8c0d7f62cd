//! Writes the CRDs into `crds/yaml/`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("yaml");
    std::fs::create_dir_all(&folder)?;
    for (file, definition) in switchtower_crds::all() {
        std::fs::write(folder.join(file), switchtower_crds::yaml(&definition)?)?;
    }
    Ok(())
}
