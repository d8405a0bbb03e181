//! One version of every dependency: two of one crate are two sets of types, and twice the code.

use std::collections::{BTreeMap, BTreeSet};

/// Crates that upstream forces on us in two versions. Remove one as soon as it is not.
const FORCED: &[(&str, &str)] = &[
    (
        "bitflags",
        "vmm-sys-util 0.15, which all of rust-vmm stands on, is with bitflags 1",
    ),
    (
        "syn",
        "build only: zerocopy-derive is with syn 2, the derives of serde, clap and thiserror with 3",
    ),
];

#[test]
fn every_dependency_has_one_version() {
    let lock = include_str!("../../Cargo.lock");
    let twice: BTreeMap<_, _> = versions(lock)
        .into_iter()
        .filter(|(_, versions)| versions.len() > 1)
        .collect();
    let forced: BTreeSet<_> = FORCED.iter().map(|(name, _reason)| *name).collect();
    for (name, versions) in &twice {
        assert!(
            forced.contains(name),
            "{name} is there as {versions:?}: `cargo tree -i {name}@VERSION` says who brings which"
        );
    }
    for name in forced {
        assert!(
            twice.contains_key(name),
            "{name} is there once: it needs no exception any more"
        );
    }
}

/// The versions of each package in a lock file.
fn versions(lock: &str) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut versions = BTreeMap::<_, BTreeSet<_>>::new();
    for package in lock.split("[[package]]").skip(1) {
        let field = |name: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.strip_prefix(" = "))
                .map(|value| value.trim_matches('"'))
                .unwrap_or_else(|| panic!("a package without a {name}"))
        };
        versions
            .entry(field("name"))
            .or_default()
            .insert(field("version"));
    }
    versions
}

#[test]
fn a_second_version_is_seen() {
    let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n\n\
                [[package]]\nname = \"a\"\nversion = \"2.0.0\"\n";
    assert_eq!(versions(lock)["a"].len(), 2);
}
