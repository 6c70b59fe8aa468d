//! The models of the fixtures.

use std::path::PathBuf;

use kvasir_engine::Model;

/// Every fixture's model, by name.
pub(crate) fn models() -> Vec<(String, Model)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(&root)
        .unwrap_or_else(|error| panic!("{}: {error}", root.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|dir| dir.join("reference.safetensors").exists())
        .collect();
    dirs.sort();
    assert!(dirs.len() >= 9, "fixtures of every architecture");
    let load = |dir: &PathBuf| {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        (name, Model::load(dir).unwrap())
    };
    dirs.iter().map(load).collect()
}
