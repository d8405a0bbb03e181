//! One version of every dependency, for two of one crate are two sets of types, and twice the code; and
//! none that nothing uses, for it is built, shipped and audited all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

/// Crates that upstream forces on us in two versions. Remove one as soon as it is not.
const FORCED: &[(&str, &str)] = &[
    (
        "bitflags",
        "vmm-sys-util 0.15, which all of rust-vmm stands on, is with bitflags 1",
    ),
    (
        "rand",
        "build only: what makes the tables of pci-ids is with rand 0.8, proptest with 0.10",
    ),
    ("rand_core", "as rand"),
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

/// The crates of the repository, by their folders.
const CRATES: &[&str] = &[
    ".",
    "pci",
    "iommu",
    "vfio",
    "vfio/host",
    "tests/lab",
    "tests/fuzz",
];

#[test]
fn every_dependency_is_used_by_the_crate_that_names_it() {
    for folder in CRATES {
        let manifest = read(&root().join(folder).join("Cargo.toml"));
        for (kind, names) in dependencies(&manifest) {
            let code = code_of(folder, kind);
            for name in names {
                assert!(
                    uses(&code, &name),
                    "{folder}/Cargo.toml: `{name}` is in [{kind}], and no source that this is for uses it"
                );
            }
        }
    }
}

/// Which of the repository's crates each may stand on: imports run one way (docs/design.md).
const BELOW: &[(&str, &[&str])] = &[
    ("pci", &[]),
    ("iommu", &[]),
    ("vfio", &["busway-iommu", "busway-pci"]),
    ("vfio/host", &["busway-iommu", "busway-pci"]),
    (
        ".",
        &["busway-host", "busway-iommu", "busway-pci", "busway-vfio"],
    ),
];

#[test]
fn imports_run_one_way() {
    for (folder, below) in BELOW {
        let manifest = read(&root().join(folder).join("Cargo.toml"));
        let ours = dependencies(&manifest)
            .into_iter()
            .flat_map(|(_, names)| names)
            .filter(|name| name.starts_with("busway"));
        for name in ours {
            assert!(
                below.contains(&name.as_str()),
                "{folder}/Cargo.toml: `{name}` is not below it"
            );
        }
    }
}

#[test]
fn a_module_with_files_of_its_own_is_their_folders_mod_rs() {
    fn look(folder: &Path, wrong: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                wrong.extend(Some(path.with_extension("rs")).filter(|file| file.exists()));
                look(&path, wrong);
            }
        }
    }
    let mut wrong = Vec::new();
    for room in ["src", "pci/src", "iommu/src", "vfio/src", "vfio/host/src"] {
        look(&root().join(room), &mut wrong);
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn every_version_of_the_workspace_is_some_crate_s() {
    let manifests: Vec<_> = CRATES
        .iter()
        .map(|folder| read(&root().join(folder).join("Cargo.toml")))
        .collect();
    let used: BTreeSet<_> = manifests
        .iter()
        .flat_map(|manifest| dependencies(manifest))
        .flat_map(|(_, names)| names)
        .collect();
    let manifest = read(&root().join("Cargo.toml"));
    let workspace = DeTable::parse(&manifest).unwrap();
    let workspace = table(workspace.get_ref(), "workspace").unwrap();
    for name in keys(table(workspace, "dependencies").unwrap()) {
        assert!(
            used.contains(&name),
            "[workspace.dependencies]: no crate has `{name}`"
        );
    }
}

#[test]
fn what_is_only_mentioned_is_not_used_and_a_renamed_crate_is_by_its_new_name() {
    let code = strip(
        "// bitflags::bitflags! in a comment\n\
         use std::fs; // zerocopy::FromBytes\n\
         let text = \"anyhow::Error and \\\" serde::Serialize\";\n\
         let tick = '\"'; let it = my_log::warn!();\n\
         use memory::Ram;\n",
    );
    for (name, used) in [
        ("bitflags", false),
        ("zerocopy", false),
        ("anyhow", false),
        ("serde", false),
        ("log", false),
        ("my-log", true),
        ("memory", true),
    ] {
        assert_eq!(uses(&code, name), used, "{name} in {code}");
    }
    let manifest = "[dependencies]\nmemory = { package = \"vm-memory\", version = \"1\" }\n\
                    libc.workspace = true\n[target.'cfg(unix)'.dev-dependencies]\nnix = \"1\"\n";
    let expected = [
        ("dependencies", vec!["libc".to_owned(), "memory".to_owned()]),
        ("dev-dependencies", vec!["nix".to_owned()]),
    ];
    assert_eq!(dependencies(manifest), expected);
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn table<'a>(of: &'a DeTable<'a>, name: &str) -> Option<&'a DeTable<'a>> {
    match of.get(name)?.get_ref() {
        DeValue::Table(table) => Some(table),
        _ => None,
    }
}

fn keys(table: &DeTable<'_>) -> Vec<String> {
    let mut keys: Vec<_> = table.keys().map(|key| key.get_ref().to_string()).collect();
    keys.sort();
    keys
}

/// The dependencies of a manifest by kind, as the code names them: one that is renamed
/// (`memory = { package = "vm-memory" }`) has the name before the equals sign.
fn dependencies(manifest: &str) -> Vec<(&'static str, Vec<String>)> {
    let manifest = DeTable::parse(manifest).unwrap();
    let manifest = manifest.get_ref();
    let mut found = Vec::new();
    let targets = table(manifest, "target").into_iter();
    let targets = targets.flat_map(|targets| targets.values());
    let targets = targets.filter_map(|target| match target.get_ref() {
        DeValue::Table(target) => Some(target),
        _ => None,
    });
    for place in [manifest].into_iter().chain(targets) {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            if let Some(names) = table(place, kind).map(keys) {
                found.push((kind, names));
            }
        }
    }
    found
}

/// The code of a crate that dependencies of a kind are for, without comments and texts.
fn code_of(folder: &str, kind: &str) -> String {
    let places: &[&str] = match kind {
        "build-dependencies" => &["build.rs"],
        "dependencies" => &["src", "targets"],
        _ => &["src", "tests", "benches", "examples"],
    };
    let others: Vec<PathBuf> = CRATES
        .iter()
        .filter(|other| **other != folder)
        .map(|other| root().join(other))
        .collect();
    let mut code = String::new();
    for place in places {
        collect(&root().join(folder).join(place), &others, &mut code);
    }
    code
}

/// All Rust code below a path, but for that of other crates.
fn collect(path: &Path, others: &[PathBuf], code: &mut String) {
    if others.iter().any(|other| other == path) {
        return;
    }
    if path.extension().is_some_and(|extension| extension == "rs") {
        code.push_str(&strip(&read(path)));
    }
    for entry in fs::read_dir(path).into_iter().flatten() {
        collect(&entry.unwrap().path(), others, code);
    }
}

/// The code without line comments and without what stands in quotes.
fn strip(text: &str) -> String {
    let mut code = String::new();
    for line in text.lines() {
        let mut quoted = false;
        let mut characters = line.chars().peekable();
        while let Some(character) = characters.next() {
            match character {
                '\\' if quoted => drop(characters.next()),
                '\'' if !quoted && characters.peek() == Some(&'"') => drop(characters.next()),
                '"' => quoted = !quoted,
                '/' if !quoted && characters.peek() == Some(&'/') => break,
                other if !quoted => code.push(other),
                _ => {}
            }
        }
        code.push('\n');
    }
    code
}

/// Whether there is a path that begins with the crate's name, or `use NAME;`.
fn uses(code: &str, name: &str) -> bool {
    let name = name.replace('-', "_");
    let is_word = |character: char| character.is_alphanumeric() || character == '_';
    code.match_indices(&name).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = &code[at + name.len()..];
        let starts = before.is_none_or(|before| !is_word(before) && before != ':');
        let in_use = code[..at].trim_end().ends_with("use");
        starts && (after.starts_with("::") || in_use && after.starts_with([';', ' ']))
    })
}
