//! Each promise of docs/promises.md is kept by tests, and the page names them rightly; the design names files
//! that there are.

use std::fs;
use std::path::Path;

/// Where tests live.
const ROOMS: [&str; 5] = ["src", "pci", "iommu", "vfio", "tests"];

#[test]
fn every_promise_names_tests_that_there_are() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources: String = ROOMS
        .iter()
        .map(|room| read_all(&root.join(room)))
        .collect();
    let column = |page: &'static str, place| {
        let rows = page.lines().filter(|line| line.starts_with("| "));
        let tests: Vec<&str> = rows
            .filter_map(|row| row.strip_prefix("| ")?.split(" | ").nth(place))
            .skip(1)
            .collect();
        assert!(!tests.is_empty());
        tests
    };
    let promises = column(include_str!("../../docs/promises.md"), 2);
    let want = column(include_str!("../../docs/want.md"), 4);
    for tests in promises.into_iter().chain(want) {
        let names: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "a promise without a test: {tests}");
        for name in names.into_iter().filter(|name| !name.contains('/')) {
            // A test's function, or a trial's name.
            let there = [format!("fn {name}("), format!("\"{name}\"")];
            assert!(
                there.iter().any(|there| sources.contains(there)),
                "a page names `{name}`, which is no test"
            );
        }
    }
}

#[test]
fn every_file_that_the_design_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = include_str!("../../docs/design.md");
    let named = page.split('`').skip(1).step_by(2);
    let named: Vec<_> = named
        .filter(|name| name.contains('/') && name.ends_with(".rs"))
        .collect();
    assert!(!named.is_empty());
    for name in named {
        // From the repository's root, or from the room that the page is about.
        let there = ["", "src"].map(|room| root.join(room).join(name));
        assert!(
            there.iter().any(|path| path.is_file()),
            "docs/design.md names `{name}`, which is no file"
        );
    }
}

/// All Rust source below a folder.
fn read_all(folder: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(folder).expect("a folder of the repository") {
        let path = entry.expect("its entry").path();
        if path.is_dir() {
            text += &read_all(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text += &fs::read_to_string(&path).expect("a source file");
        }
    }
    text
}
