//! `busway device list`, `check` and `busway doctor` on every host of the library, in every form and
//! width: `tests/cli/hosts/HOST-….txt`. `SNAPSHOTS=overwrite` writes them anew, to be looked at.

#[path = "../../vfio/host/tests/fake_host/mod.rs"]
mod fake_host;
#[path = "reported.rs"]
mod reported;

use std::path::PathBuf;

use busway::cli::device::{DeviceArgs, DeviceCommandError, run_on};
use busway::cli::doctor::{self, DoctorArgs};
use busway::cli::style::Screen;
use clap::{Args, FromArgMatches};
use fake_host::FakeHost;
use fake_host::library::HOSTS;
use snapbox::{Data, assert_data_eq};

fn parse<A: Args + FromArgMatches>(words: &str) -> A {
    let command = A::augment_args(clap::Command::new("busway").no_binary_name(true));
    let matches = command.try_get_matches_from(words.split_whitespace());
    A::from_arg_matches(&matches.unwrap()).unwrap()
}

fn device(
    host: &FakeHost,
    words: &str,
    screen: Screen,
) -> (String, Result<(), DeviceCommandError>) {
    let mut out = Vec::new();
    let args: DeviceArgs = parse(words);
    let end = run_on(&args, &host.root, &mut host.kernel(), &mut out, screen);
    (String::from_utf8(out).unwrap(), end)
}

fn listed(host: &FakeHost, words: &str, screen: Screen) -> String {
    let (text, end) = device(host, words, screen);
    end.unwrap();
    text
}

fn examined(host: &FakeHost, words: &str, screen: Screen) -> (String, bool) {
    let mut out = Vec::new();
    let args: DoctorArgs = parse(words);
    let opens = |_: &std::path::Path| Ok(());
    let healthy = doctor::run_on(&args, &host.root, &opens, &mut out, screen).unwrap();
    (String::from_utf8(out).unwrap(), healthy)
}

fn columns(width: usize) -> Screen {
    Some(width).into()
}

const COLOUR: Screen = Screen {
    width: Some(100),
    height: None,
    colour: true,
};

#[track_caller]
fn check(name: &str, text: String) {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests/cli/hosts", name]
        .iter()
        .collect();
    assert_data_eq!(text, Data::read_from(&path, None).raw());
}

/// No line is wider than the screen, unless it holds a command, which is never cut.
#[track_caller]
fn check_fits(text: &str, width: usize) {
    for line in text.lines() {
        let columns = line.chars().count();
        let is_command = line.starts_with(&" ".repeat(21));
        assert!(columns <= width || is_command, "{columns}: {line}");
    }
}

#[test]
fn every_host_is_listed_on_every_terminal() {
    for (name, _) in HOSTS {
        let host = FakeHost::named(name);
        for width in [60, 80, 120, 200] {
            let text = listed(&host, "list", columns(width));
            check_fits(&text, width);
            check(&format!("{name}-list-{width}.txt"), text);
        }
        let text = listed(&host, "list", Screen::default());
        check(&format!("{name}-list-pipe.txt"), text);
    }
}

#[test]
fn every_host_is_shown_as_blocks_trees_and_json() {
    for (name, _) in HOSTS {
        let host = FakeHost::named(name);
        let text = listed(&host, "list --long", columns(80));
        check_fits(&text, 80);
        check(&format!("{name}-long-80.txt"), text);
        let text = listed(&host, "list --tree", columns(80));
        check_fits(&text, 80);
        check(&format!("{name}-tree-80.txt"), text);
        let text = listed(&host, "list --json", Screen::default());
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["version"], 1);
        check(&format!("{name}-list.json"), text);
        let picture = listed(&host, "list --svg -", Screen::default());
        check(&format!("{name}.svg"), picture);
    }
}

#[test]
fn colours_stand_where_they_should() {
    let host = FakeHost::named("workstation");
    check("workstation-list-colour.txt", listed(&host, "list", COLOUR));
    let tree = listed(&host, "list --tree", COLOUR);
    check("workstation-tree-colour.txt", tree);
    let (text, _) = device(&host, "check 08:00.0", COLOUR);
    check("workstation-check-colour.txt", text);
}

#[test]
fn nothing_of_a_hostile_host_reaches_the_terminal() {
    let host = FakeHost::named("hostile");
    let mut texts = vec![
        listed(&host, "list", columns(80)),
        listed(&host, "list --long", columns(80)),
        listed(&host, "list --tree", columns(80)),
        listed(&host, "list --json", columns(80)),
        listed(&host, "list --svg -", columns(80)),
        examined(&host, "", columns(80)).0,
    ];
    let all = "check 00:01.0 00:02.0 01:00.0 01:00.1 01:00.2 77:00.0";
    texts.push(device(&host, all, columns(80)).0);
    for text in texts {
        let steers = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!text.contains(steers), "{text:?}");
    }
}

#[test]
fn only_devices_of_a_kind_or_a_group_are_shown() {
    let host = FakeHost::named("laptop");
    let addresses = |words: &str| -> Vec<String> {
        let text = listed(&host, words, Screen::default());
        let lines = text.lines().skip(1);
        lines.map(|line| line[5..12].to_owned()).collect()
    };
    assert_eq!(
        addresses("list --group 1"),
        ["00:01.0", "01:00.0", "01:00.1"]
    );
    assert_eq!(addresses("list --class nvme"), ["02:00.0"]);
    assert_eq!(addresses("list --class 0108"), ["02:00.0"]);
    assert_eq!(addresses("list --class net"), ["00:1f.6", "03:00.0"]);
    assert_eq!(addresses("list --class gpu --group 1"), ["01:00.0"]);
    assert_eq!(addresses("list 01:00.0 --group 9"), [""; 0]);
    for (words, text) in [
        (
            "list --group 77",
            "there is no IOMMU group 77; they are numbered 0 to 13",
        ),
        (
            "list --class toaster",
            "no device is of the kind `toaster`; there are: Audio device, ",
        ),
        ("list 77:00.0", "0000:77:00.0: there is no such PCI device"),
    ] {
        let (_, end) = device(&host, words, Screen::default());
        let error = end.unwrap_err();
        assert_eq!(error.exit_status(), 2);
        assert!(error.to_string().starts_with(text), "{error}");
    }
}

#[test]
fn a_tree_of_some_devices_has_the_bridges_above_them() {
    let host = FakeHost::named("laptop");
    let tree = listed(&host, "list --tree --class nvme", Screen::default());
    assert!(tree.contains("0000:00:1b.0") && tree.contains("0000:02:00.0"));
    assert_eq!(tree.matches("0000:0").count(), 3, "{tree}");
}

/// Whom to ask about: at least one device of each host for each thing that can be found.
const CHECKS: [(&str, &str, &str); 15] = [
    ("laptop", "shared", "check 01:00.0"),
    ("laptop", "whole-group", "check 01:00.0 01:00.1"),
    ("laptop", "system", "check 02:00.0"),
    ("laptop", "display", "check 00:02.0"),
    ("laptop", "absent", "check 00:01.0 44:00.0"),
    ("server", "ssh", "check 18:00.1"),
    ("server", "rmrr", "check ae:00.0"),
    ("server", "held", "check 18:02.0"),
    ("server", "variant", "check 65:00.2"),
    ("server", "denied", "check ae:05.0"),
    ("workstation", "acs", "check 04:00.0"),
    ("workstation", "held", "check 08:00.0"),
    ("workstation", "open", "check 09:00.0 09:00.1"),
    ("no-iommu", "nic", "check 00:1f.6"),
    ("old-xeon", "conventional", "check 02:02.0 --memory 4G"),
];

#[test]
fn every_obstacle_is_named_with_its_remedy() {
    for (host, what, words) in CHECKS {
        let fake = FakeHost::named(host);
        let (text, end) = device(&fake, words, columns(80));
        check_fits(&text, 80);
        let status = end.map_or_else(|error| error.exit_status(), |()| 0);
        let text = format!("$ busway device {words}\n{text}exit status {status}\n");
        check(&format!("{host}-check-{what}.txt"), text);
    }
}

#[test]
fn a_device_with_vfio_that_nobody_has_is_ready() {
    let host = FakeHost::named("storage");
    host.driver("vfio-pci");
    let folder = host.path("sys/bus/pci/devices/0000:47:00.0");
    std::fs::remove_file(folder.join("driver")).unwrap();
    host.link(
        "sys/bus/pci/devices/0000:47:00.0/driver",
        "sys/bus/pci/drivers/vfio-pci",
    );
    host.file("dev/vfio/56", "");
    let (text, end) = device(&host, "check 47:00.0", columns(80));
    end.unwrap();
    check("storage-check-ready.txt", text);
    let (text, end) = device(&host, "check 47:00.0 --json", columns(80));
    end.unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["ready"], true);
    assert_eq!(json["devices"][0]["address"], "0000:47:00.0");
    check("storage-check-ready.json", text);
}

#[test]
fn the_doctor_finds_what_is_wrong_with_every_host() {
    for (name, _) in HOSTS {
        let host = FakeHost::named(name);
        let (text, healthy) = examined(&host, "", columns(80));
        check_fits(&text, 80);
        let sick = ["no-iommu", "old-xeon", "hostile", "workstation"];
        assert_eq!(healthy, !sick.contains(&name), "{name}");
        check(&format!("{name}-doctor.txt"), text);
        let (text, _) = examined(&host, "--json", columns(80));
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["healthy"], healthy);
    }
}

#[test]
fn a_node_that_the_device_cgroup_forbids_is_told_from_one_that_the_mode_does() {
    let host = FakeHost::named("laptop");
    let opens = |path: &std::path::Path| match path.ends_with("kvm") {
        true => Err(std::io::Error::from_raw_os_error(libc::EPERM)),
        false => Ok(()),
    };
    // A made-up node is no device; the machine's own null device stands in for it.
    std::fs::remove_file(host.path("dev/kvm")).unwrap();
    std::os::unix::fs::symlink("/dev/null", host.path("dev/kvm")).unwrap();
    let mut out = Vec::new();
    let args = parse("");
    let healthy = doctor::run_on(&args, &host.root, &opens, &mut out, None).unwrap();
    let text = String::from_utf8(out).unwrap();
    assert!(
        !healthy && text.contains("device cgroup forbids /dev/kvm"),
        "{text}"
    );
}
