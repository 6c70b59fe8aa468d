//! Which package may import which, asserted from the manifests.

#![allow(
    clippy::unwrap_used,
    reason = "a test states its expectations by unwrapping"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Allowed edges between our packages. Everything not listed is refused.
const ALLOWED: &[(&str, &[&str])] = &[
    ("kvasir-types", &[]),
    ("kvasir-proto", &["kvasir-types"]),
    ("kvasir-codec", &["kvasir-types"]),
    ("kvasir-cuda", &["kvasir-types", "kvasir-codec"]),
    ("kvasir-mem", &[]),
    ("kvasir-transport", &["kvasir-mem"]),
    (
        "kvasir-store",
        &["kvasir-types", "kvasir-codec", "kvasir-mem"],
    ),
    // Profiles are checked before they are handed out.
    (
        "kvasir-client",
        &[
            "kvasir-types",
            "kvasir-proto",
            "kvasir-codec",
            "kvasir-transport",
        ],
    ),
    (
        "kvasir-server",
        &[
            "kvasir-types",
            "kvasir-proto",
            "kvasir-codec",
            "kvasir-store",
            "kvasir-transport",
            "kvasir-client",
        ],
    ),
    (
        "kvasir-plugin",
        &["kvasir-types", "kvasir-codec", "kvasir-client"],
    ),
    (
        "kvasir-engine",
        &["kvasir-types", "kvasir-plugin", "kvasir-cuda"],
    ),
    (
        "kvasir-python",
        &["kvasir-types", "kvasir-client", "kvasir-plugin"],
    ),
    // Without sockets, so that it can be built with a sanitizer.
    ("kvasir-events", &["kvasir-types"]),
    (
        "kvasir-index",
        &[
            "kvasir-types",
            "kvasir-proto",
            "kvasir-client",
            "kvasir-events",
        ],
    ),
    ("kvasir-bench", ANY),
    ("kvasir-tests", ANY),
    // Small, because it is built once more with a sanitizer.
    (
        "kvasir-fuzz",
        &[
            "kvasir-types",
            "kvasir-codec",
            "kvasir-transport",
            "kvasir-events",
        ],
    ),
];

const ANY: &[&str] = &["*"];

/// External crates that may appear only in some of our packages.
const CONFINED: &[(&str, &[&str])] = &[
    (
        "tonic",
        &[
            "kvasir-proto",
            "kvasir-client",
            "kvasir-server",
            "kvasir-index",
            "kvasir-bench",
            "kvasir-tests",
        ],
    ),
    ("rocksdb", &["kvasir-store"]),
    ("pyo3", &["kvasir-python"]),
    ("zeromq", &["kvasir-index"]),
    ("cudarc", &["kvasir-cuda", "kvasir-engine"]),
    ("ibverbs", &["kvasir-transport"]),
    ("ibverbs-sys", &["kvasir-transport"]),
];

/// External crates that must never appear in some of our packages.
const BANNED: &[(&str, &[&str])] = &[(
    "tokio",
    &[
        "kvasir-types",
        "kvasir-codec",
        "kvasir-cuda",
        "kvasir-mem",
        "kvasir-proto",
        "kvasir-events",
    ],
)];

#[test]
fn packages_import_only_what_the_design_allows() {
    let manifests = manifests();
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    assert_eq!(
        manifests
            .keys()
            .map(String::as_str)
            .collect::<BTreeSet<_>>(),
        allowed.keys().copied().collect::<BTreeSet<_>>(),
        "every package of the workspace has an entry above, and no other"
    );
    for (package, dependencies) in &manifests {
        let permitted = allowed[package.as_str()];
        for dependency in dependencies
            .iter()
            .filter(|name| name.starts_with("kvasir-"))
        {
            assert!(
                permitted == ANY || permitted.contains(&dependency.as_str()),
                "{package} must not import {dependency}"
            );
        }
        for (external, homes) in CONFINED {
            assert!(
                !dependencies.contains(*external) || homes.contains(&package.as_str()),
                "{external} must not appear in {package}"
            );
        }
        for (external, strangers) in BANNED {
            assert!(
                !(dependencies.contains(*external) && strangers.contains(&package.as_str())),
                "{external} must not appear in {package}"
            );
        }
    }
}

#[test]
fn versions_are_declared_once() {
    for path in member_manifests() {
        let manifest: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(toml::Value::Table(dependencies)) = manifest.get(section) else {
                continue;
            };
            for (name, spec) in dependencies {
                assert!(
                    spec.get("workspace").and_then(toml::Value::as_bool) == Some(true),
                    "{}: {name} is declared here and not in the root manifest",
                    path.display()
                );
            }
        }
    }
}

/// Normal and build dependencies per package; what tests import is theirs to choose.
fn manifests() -> BTreeMap<String, BTreeSet<String>> {
    member_manifests()
        .iter()
        .map(|path| {
            let manifest: toml::Table = std::fs::read_to_string(path).unwrap().parse().unwrap();
            let name = manifest["package"]["name"].as_str().unwrap().to_owned();
            let dependencies = ["dependencies", "build-dependencies"]
                .iter()
                .filter_map(|section| manifest.get(*section)?.as_table())
                .flat_map(|table| table.keys().cloned())
                .collect();
            (name, dependencies)
        })
        .collect()
}

fn member_manifests() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let workspace: toml::Table = std::fs::read_to_string(root.join("Cargo.toml"))
        .unwrap()
        .parse()
        .unwrap();
    workspace["workspace"]["members"]
        .as_array()
        .unwrap()
        .iter()
        .map(|member| root.join(member.as_str().unwrap()).join("Cargo.toml"))
        .collect()
}
