//! Compiles the protocol without `protoc`: `protox` parses it, `tonic` generates.

use std::error::Error;
use std::path::PathBuf;

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
    let sources = ["cache", "index"].map(|name| root.join(format!("kvasir/v1/{name}.proto")));
    for source in &sources {
        println!("cargo:rerun-if-changed={}", source.display());
    }
    let descriptors = protox::compile(&sources, [&root])?;
    let path = PathBuf::from(std::env::var("OUT_DIR")?).join("kvasir_v1.bin");
    std::fs::write(&path, descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        .file_descriptor_set_path(&path)
        .skip_protoc_run()
        .compile_protos(&sources, &[root])?;
    Ok(())
}
