//! The package: what it is made of, what its units promise, and what is in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn packaging(name: &str) -> String {
    fs::read_to_string(root().join("packaging").join(name)).unwrap()
}

/// Runs a program that not every machine has; nothing, said on standard error, where this one has not.
fn run(program: &str, args: &[&str]) -> Option<Output> {
    match Command::new(program).args(args).output() {
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("skipped: {program}: {error}");
            None
        }
    }
}

/// The settings of a unit, each with all its values.
fn settings(unit: &str) -> BTreeMap<String, Vec<String>> {
    let text = packaging(&format!("systemd/{unit}"));
    let mut settings = BTreeMap::<_, Vec<_>>::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some((key, value)) = line.split_once('=') {
            settings
                .entry(key.to_owned())
                .or_default()
                .push(value.to_owned());
        }
    }
    settings
}

#[test]
fn a_vms_unit_stops_by_the_power_button_and_repeats_nothing_that_cannot_come_out_otherwise() {
    let unit = settings("busway@.service");
    let only = |key: &str| unit[key].join(" ");
    // Nothing runs at the end that could fail: the guest's own power-off is a success.
    for none in ["ExecStop", "ExecStopPost", "SuccessExitStatus"] {
        assert!(!unit.contains_key(none), "{none}");
    }
    assert_eq!(only("KillSignal"), "SIGTERM");
    assert_eq!(only("KillMode"), "mixed");
    assert_eq!(only("Restart"), "on-failure");
    assert_eq!(only("RestartPreventExitStatus"), "2 3");
    assert_eq!(only("Type"), "notify");
    // Longer than the guest has where nothing else is said, and than a device may take to be given back.
    assert!(only("TimeoutStopSec").parse::<u32>().unwrap() > 20 + 60);
    assert!(only("WatchdogSec").parse::<u32>().unwrap() > 0);
    assert_eq!(only("LimitMEMLOCK"), "infinity");
    // N4: no right comes from the file.
    for set in ["CapabilityBoundingSet", "AmbientCapabilities"] {
        assert_eq!(only(set), "", "{set}");
    }
}

#[test]
fn a_vms_unit_is_exposed_little() {
    let unit = root().join("packaging/systemd/busway@.service");
    // Ten times the exposure, above which it fails.
    let args = ["security", "--offline=true", "--no-pager", "--threshold=25"];
    let Some(output) = run(
        "systemd-analyze",
        &[&args[..], &[unit.to_str().unwrap()]].concat(),
    ) else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let last = said.lines().rfind(|line| line.contains("exposure level"));
    assert!(output.status.success(), "{last:?}");
}

/// The calls that a set of systemd's has, or the call itself.
fn members<'a>(sets: &BTreeMap<&'a str, Vec<&'a str>>, name: &'a str) -> BTreeSet<&'a str> {
    match sets.get(name) {
        Some(inner) => inner.iter().flat_map(|one| members(sets, one)).collect(),
        None => BTreeSet::from([name]),
    }
}

#[test]
fn a_vms_unit_lets_each_call_pass_that_busways_own_filters_do() {
    let Some(output) = run("systemd-analyze", &["syscall-filter"]) else {
        return;
    };
    let text = String::from_utf8(output.stdout).unwrap();
    let mut sets = BTreeMap::<_, Vec<_>>::new();
    let mut set = "";
    for line in text.lines() {
        match line.trim() {
            "" => {}
            word if word.starts_with('#') => {}
            name if line.starts_with('@') => set = name,
            word => sets.entry(set).or_default().push(word),
        }
    }
    let unit = settings("busway@.service");
    let mut passes = BTreeSet::new();
    for value in &unit["SystemCallFilter"] {
        let (denies, words) = match value.strip_prefix('~') {
            Some(words) => (true, words),
            None => (false, &**value),
        };
        for name in words.split(' ').flat_map(|word| members(&sets, word)) {
            match denies {
                true => passes.remove(name),
                false => passes.insert(name),
            };
        }
    }
    let table = include_str!("../../src/sandbox/table.rs");
    let named = table.split("libc::SYS_").skip(1).map(|rest| {
        let end = rest.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        rest.split_at(end.unwrap_or(rest.len())).0
    });
    let kept: BTreeSet<_> = named.filter(|name| !passes.contains(name)).collect();
    assert!(kept.is_empty(), "the unit keeps from Busway: {kept:?}");
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // Verified as installed: its program and its pages are here.
    let program = env!("CARGO_BIN_EXE_busway");
    for (unit, name) in [
        ("busway@.service", "busway@web.service"),
        ("busway-devices.service", "busway-devices.service"),
        ("busway.slice", "busway.slice"),
    ] {
        let text = packaging(&format!("systemd/{unit}"));
        let lines = text
            .lines()
            .filter(|line| !line.starts_with("Documentation="));
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        fs::write(path(name), text.replace("/usr/bin/busway", program)).unwrap();
    }
    let units = ["busway@web.service", "busway-devices.service"].map(path);
    let units = units.each_ref().map(|unit| unit.to_str().unwrap());
    let Some(output) = run("systemd-analyze", &[&["verify"][..], &units].concat()) else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && !said.contains("busway"),
        "{said}"
    );
}

#[test]
fn an_upgrade_touches_no_vm() {
    // N3: only a removal stops units, and nothing starts or restarts any.
    for script in ["postinst", "prerm", "postrm"] {
        let text = packaging(&format!("debian/{script}"));
        let acts = |word: &str| {
            let lines = text.lines().filter(|line| !line.trim().starts_with('#'));
            lines.filter(|line| line.contains(word)).count()
        };
        for word in [
            "systemctl start",
            "systemctl restart",
            "systemctl try-restart",
            "setcap",
        ] {
            assert_eq!(acts(word), 0, "{script}: {word}");
        }
        assert_eq!(
            acts("systemctl stop"),
            usize::from(script == "prerm"),
            "{script}"
        );
        let path = root().join("packaging/debian").join(script);
        let checked = run("sh", &["-n", path.to_str().unwrap()]);
        assert!(
            checked.is_some_and(|output| output.status.success()),
            "{script}"
        );
    }
    let prerm = packaging("debian/prerm");
    let removal = prerm.split("\nremove)").nth(1).unwrap();
    let removal = removal.split(";;").next().unwrap();
    assert!(removal.contains("systemctl stop"));
    assert!(packaging("needrestart/busway.conf").contains("qr(^busway@.+\\.service$)} = 0"));
}

/// The package of this program, of a version; nothing where this machine cannot make one.
fn package(version: &str, folder: &Path) -> Option<PathBuf> {
    run("dpkg-deb", &["--version"])?;
    let script = root().join("scripts/package");
    let output = Command::new(script)
        .args([
            "--fast",
            "--program",
            env!("CARGO_BIN_EXE_busway"),
            "--version",
            version,
        ])
        .arg("--output")
        .arg(folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let path = String::from_utf8(output.stdout).unwrap();
    let path = PathBuf::from(path.lines().last().unwrap());
    assert!(
        path.ends_with(format!("busway_{version}_amd64.deb")),
        "{path:?}"
    );
    Some(path)
}

#[test]
fn the_package_has_the_program_its_manual_completions_units_rules_and_examples() {
    let folder = tempfile::tempdir().unwrap();
    let Some(package) = package("1.2.3", folder.path()) else {
        return;
    };
    let package = package.to_str().unwrap();
    let list = run("dpkg-deb", &["--contents", package]).unwrap().stdout;
    let list = String::from_utf8(list).unwrap();
    for path in [
        "usr/bin/busway",
        "usr/bin/vfio-bind",
        "usr/share/man/man1/busway.1.gz",
        "usr/share/man/man1/busway-run.1.gz",
        "usr/share/man/man1/busway-device-bind.1.gz",
        "usr/share/man/man5/busway.toml.5.gz",
        "usr/share/bash-completion/completions/busway",
        "usr/share/zsh/vendor-completions/_busway",
        "usr/share/fish/vendor_completions.d/busway.fish",
        "usr/lib/systemd/system/busway@.service",
        "usr/lib/systemd/system/busway-devices.service",
        "usr/lib/systemd/system/busway.slice",
        "usr/lib/udev/rules.d/60-busway.rules",
        "usr/lib/sysusers.d/busway.conf",
        "etc/needrestart/conf.d/busway.conf",
        "etc/busway/",
        "usr/share/doc/busway/copyright",
        "usr/share/doc/busway/changelog.gz",
        "usr/share/doc/busway/examples/nvme-drive.toml",
        "usr/share/doc/busway/examples/driver-domain/net-domain.toml",
        "usr/share/doc/busway/docs/promises.md",
    ] {
        let there = list
            .lines()
            .any(|line| line.ends_with(&format!(" ./{path}")));
        assert!(there, "{path} is not in\n{list}");
    }
    // All is root's, and only the program and the scripts are for execution.
    for line in list.lines() {
        assert!(line.contains(" root/root "), "{line}");
        let is_program = line.contains("/usr/bin/");
        let mode = if is_program {
            "-rwxr-xr-x"
        } else {
            "-rw-r--r--"
        };
        assert!(line.starts_with('d') || line.starts_with(mode), "{line}");
    }
    // N4: a file that an upgrade replaces has no right of its own that would be lost.
    assert!(!list.contains("rws"), "{list}");
    let field = |name: &str| {
        let output = run("dpkg-deb", &["--field", package, name]).unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(
        (field("Version"), field("Package")),
        ("1.2.3".into(), "busway".into())
    );
}
