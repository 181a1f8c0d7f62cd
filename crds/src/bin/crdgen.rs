//! Writes the CRDs into `crds/yaml/`, or into the folder given as the only argument.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/yaml").to_owned();
    let folder = std::path::PathBuf::from(std::env::args().nth(1).unwrap_or(default));
    std::fs::create_dir_all(&folder)?;
    for (file, definition) in switchtower_crds::all() {
        std::fs::write(folder.join(file), switchtower_crds::yaml(&definition)?)?;
    }
    Ok(())
}
