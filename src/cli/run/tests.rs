use super::*;
use crate::config::DeviceConfig;
use clap::Parser;

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    run: RunArgs,
}

fn config(flags: &[&str]) -> Result<VmConfig, String> {
    let flags = ["run", "--kernel", "vmlinuz"].iter().chain(flags);
    let args = Command::try_parse_from(flags).map_err(|error| error.to_string())?;
    args.run.config().map_err(|error| error.to_string())
}

#[test]
fn the_first_guest_can_be_seen() {
    let shown = config(&[]).unwrap();
    assert_eq!(shown.serial, ConsoleConfig::Tty);
    assert_eq!(shown.console, ConsoleConfig::Off);
    // The machine has a default that follows both.
    assert_eq!(shown.cmdline, None);
    let own = config(&["--cmdline", ""]).unwrap();
    assert_eq!(own.cmdline.as_deref(), Some(""));
}

#[test]
fn a_repeatable_flag_takes_one_or_several() {
    let config = config(&[
        "--disk",
        "path=a",
        "path=b,readonly=on",
        "--device",
        "01:00.0",
        "02:00.0",
        "--disk",
        "path=c",
    ])
    .unwrap();
    let paths: Vec<_> = config.disk.iter().map(|disk| disk.path.to_str()).collect();
    assert_eq!(paths, [Some("a"), Some("b"), Some("c")]);
    assert!(config.disk[1].readonly);
    assert_eq!(
        config.device,
        ["0000:01:00.0", "0000:02:00.0"].map(|address| DeviceConfig::new(address).unwrap())
    );
}

#[test]
fn which_machine_it_is_is_said_in_cloud_hypervisors_words() {
    let said = config(&[
        "--platform",
        "serial_number=bw-1,uuid=3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611",
        "--platform",
        "oem_strings=[a,\"b,c=d\"]",
    ])
    .unwrap()
    .platform;
    assert_eq!(said.serial_number.as_deref(), Some("bw-1"));
    let uuid = "3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611";
    assert_eq!(said.uuid.as_deref(), Some(uuid));
    assert_eq!(said.oem_strings, ["a", "b,c=d"]);
    let one = config(&["--platform", "oem_strings=a"]).unwrap().platform;
    assert_eq!(one.oem_strings, ["a"]);
    let wrong = config(&["--platform", "uuid=7"]).unwrap_err();
    assert!(wrong.contains("uuid=`7` is no UUID"), "{wrong}");
}

#[test]
fn flags_come_after_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    let text = "kernel = \"other\"\nserial = \"pty\"\nmemory = \"size=1G,shared=on\"\n\
                [[disk]]\npath = \"a\"\n";
    fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let config = config(&["--config", file, "--memory", "size=2G", "--disk", "path=b"]).unwrap();
    assert_eq!(config.kernel, Some("vmlinuz".into()));
    assert_eq!(config.serial, ConsoleConfig::Pty);
    assert_eq!((config.memory.size, config.memory.shared), (2 << 30, true));
    assert_eq!(config.disk.len(), 2);
    assert_eq!(config.disk[1].path, Path::new("b"));
}

#[test]
fn the_control_socket_is_a_path_or_a_descriptor() {
    let socket = |said: &str| {
        let args = Command::try_parse_from(["run", "--api-socket", said]).unwrap();
        args.run.api_socket().map_err(|error| error.to_string())
    };
    for said in ["/run/vm", "path=/run/vm"] {
        assert_eq!(
            socket(said),
            Ok(Some(SocketAddress::Path("/run/vm".into())))
        );
    }
    assert_eq!(socket("fd=3"), Ok(Some(SocketAddress::Fd(3))));
    for (said, why) in [
        ("", "`path` or `fd` is missing"),
        ("path=", "there is nothing after the `=`"),
        ("fd=x", "`x` is not a whole number"),
        ("path=a,fd=3", "only one of these can be said"),
        ("pth=a", "unknown key `pth`; did you mean `path`?"),
    ] {
        let error = socket(said).unwrap_err();
        assert!(error.starts_with("--api-socket"), "{error}");
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_report_must_have_a_folder_to_be_in() {
    let check = |file: &str| {
        Publication {
            file: Some(file.into()),
            table: false,
        }
        .check()
        .map_err(|failure| failure.to_string())
    };
    assert_eq!(check("report.json"), Ok(()));
    assert_eq!(check("/dev/stdout"), Ok(()));
    for file in [
        "/nowhere/at/all/report.json",
        "/",
        "/tmp",
        "/dev/null/report.json",
    ] {
        let complaint = check(file).unwrap_err();
        assert!(
            complaint.starts_with(&format!("--report {file}: ")),
            "{complaint}"
        );
    }
}

#[test]
fn the_report_is_out_when_the_guest_runs_and_again_at_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let publication = Publication {
        file: Some(file.clone()),
        table: false,
    };
    let report = Arc::new(Report::start());
    let publisher = publication.when_running(&report).unwrap();
    report.reached(Stage::FirstInstruction);
    publisher.join().unwrap();
    let read =
        || -> serde_json::Value { serde_json::from_slice(&fs::read(&file).unwrap()).unwrap() };
    assert!(read()["milliseconds"]["first_instruction"].is_number());
    assert_eq!(read()["vectors"], 0);
    report.set_vectors(4, 0);
    publication.publish(&report);
    assert_eq!(read()["vectors"], 4);
}

#[test]
fn firmware_is_named_or_found_and_keeps_its_variables_where_it_is_told() {
    let firmware = |said: &str| {
        let shown = config(&["--firmware", said]).unwrap().firmware.unwrap();
        (shown.path, shown.vars)
    };
    let file = |name: &str| Some(PathBuf::from(name));
    assert_eq!(firmware("auto"), (None, None));
    assert_eq!(firmware("OVMF.fd"), (file("OVMF.fd"), None));
    assert_eq!(firmware("vars=vm.vars"), (None, file("vm.vars")));
    assert_eq!(firmware("path=a,vars=b"), (file("a"), file("b")));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.toml");
    fs::write(&path, "[firmware]\nvars = \"vm.vars\"\n").unwrap();
    let shown = config(&["--config", path.to_str().unwrap(), "--firmware", "OVMF.fd"]).unwrap();
    let expected = crate::config::FirmwareConfig {
        path: file("OVMF.fd"),
        vars: file("vm.vars"),
    };
    assert_eq!(shown.firmware, Some(expected));
}

#[test]
fn every_example_describes_a_vm_that_is_in_order() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let files = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    // Those of several VMs that belong together are in a folder.
    let all = files(&examples)
        .into_iter()
        .flat_map(|path| match path.is_dir() {
            true => files(&path),
            false => vec![path],
        });
    let mut found = std::collections::BTreeMap::new();
    for path in all.filter(|path| path.extension().is_some_and(|end| end == "toml")) {
        let flags = ["run", "--config"].map(Into::into);
        let flags = flags.into_iter().chain([path.clone().into_os_string()]);
        let args = Command::try_parse_from(flags).unwrap();
        let config = args.run.config();
        let config = config.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        found.insert(name, config);
    }
    let names: Vec<_> = found.keys().map(String::as_str).collect();
    let expected = [
        "gpus-p2p",
        "net-domain",
        "nic-and-disk",
        "nvme-drive",
        "vf-per-guest",
        "web",
    ];
    assert_eq!(names, expected);
    // All have a device of the host's, but for the guest behind the driver domain, which has another tap than that.
    for (name, config) in &found {
        assert_eq!(config.device.is_empty(), name == "web", "{name}");
    }
    let taps = ["net-domain", "web"].map(|name| {
        let net = &found[name].net;
        assert_eq!(net.len(), 1);
        net[0].tap.clone()
    });
    assert_eq!(taps, [Some("net-domain".into()), Some("web".into())]);
    let gpus = &found["gpus-p2p"];
    assert_eq!(gpus.platform.p2p, crate::config::Choice::On);
    assert!(
        gpus.device
            .iter()
            .all(|gpu| gpu.x_nv_gpudirect_clique == Some(0))
    );
    assert_eq!(found["nvme-drive"].device[0].boot_index, Some(0));
    let limit = found["nvme-drive"].platform.power_off_limit();
    assert_eq!(limit, std::time::Duration::from_secs(120));
}
