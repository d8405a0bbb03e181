use super::*;
use crate::config::{ConsoleConfig, DeviceConfig, DiskConfig};

fn read(text: &str) -> Result<VmConfig, String> {
    let mut config = VmConfig::default();
    apply(&mut config, Path::new("vm.toml"), text).map_err(|error| error.to_string())?;
    Ok(config)
}

fn complaint(text: &str) -> String {
    read(text).unwrap_err()
}

#[test]
fn a_whole_machine_is_read() {
    let config = read(
        r#"
        kernel = "vmlinuz"
        cmdline = ""
        serial = { size = "1M", file = "/tmp/serial.log" }
        console = { socket = "/run/console" }
        device = ["01:00.0"]
        rng.src = "/dev/hwrng"

        [cpus]
        boot = 2

        [memory]
        size = "2G"
        shared = true
        prefault = "off"

        [[disk]]
        path = "a.raw"
        [[disk]]
        path = "b.raw"
        readonly = "on"
        num_queues = 4

        [[net]]

        [platform]
        iommufd = "auto"
        oem_strings = ["a", "b,c"]
        "#,
    )
    .unwrap();
    let expected = VmConfig {
        kernel: Some("vmlinuz".into()),
        cmdline: Some(String::new()),
        serial: ConsoleConfig::File {
            path: "/tmp/serial.log".into(),
            size: 1 << 20,
        },
        console: ConsoleConfig::Socket("/run/console".into()),
        device: vec![DeviceConfig::new("0000:01:00.0").unwrap()],
        disk: vec![
            DiskConfig::new("a.raw"),
            DiskConfig {
                readonly: true,
                num_queues: 4,
                ..DiskConfig::new("b.raw")
            },
        ],
        net: vec![crate::config::NetConfig::default()],
        rng: crate::config::RngConfig {
            src: "/dev/hwrng".into(),
            ..crate::config::RngConfig::default()
        },
        cpus: crate::config::CpusConfig {
            boot: 2,
            ..Default::default()
        },
        memory: crate::config::MemoryConfig {
            size: 2 << 30,
            shared: true,
            prefault: Some(false),
            ..Default::default()
        },
        platform: crate::config::PlatformConfig {
            oem_strings: vec!["a".into(), "b,c".into()],
            ..Default::default()
        },
        ..VmConfig::default()
    };
    assert_eq!(config, expected);
}

#[test]
fn a_section_can_be_said_as_its_flag_is() {
    let config = read("cpus = \"boot=2,max=4\"\ndisk = [\"path=a,readonly=on\"]").unwrap();
    assert_eq!((config.cpus.boot, config.cpus.max), (2, Some(4)));
    assert!(config.disk[0].readonly);
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest() {
    let text = complaint("kernel = \"k\"\n\n[memroy]\nsize = 1\n");
    assert!(
        text.starts_with("vm.toml: unknown key `memroy`, line 3; did you mean `memory`? "),
        "{text}"
    );
    let text = complaint("[memory]\nsise = 1\n");
    assert!(
        text.starts_with("vm.toml: unknown key `sise` of `memory`, line 2; did you mean `size`?"),
        "{text}"
    );
    let text = complaint("[[disk]]\npath = \"a\"\nfoo = 1\n");
    assert!(
        text.contains("`foo` of `disk`, line 3 (there are: path, "),
        "{text}"
    );
}

#[test]
fn a_wrong_value_is_named_with_its_line_and_key() {
    for (text, expected) in [
        (
            "[cpus]\nboot = 300",
            "vm.toml, line 2: cpus.boot: `300` is not a whole number",
        ),
        (
            "[cpus]\nboot = 1.5",
            "vm.toml, line 2: cpus.boot: `a number with a point` is not",
        ),
        (
            "memory.size = \"5X\"",
            "vm.toml, line 1: memory.size: `5X` is not a size",
        ),
        (
            "[memory]\n\nshared = 1",
            "vm.toml, line 3: memory.shared: `1` is neither on nor off",
        ),
        ("kernel = 5", "vm.toml, line 1: kernel: `5` is not text"),
        (
            "cpus = 2",
            "vm.toml, line 1: cpus: is a number, where a table ([cpus])",
        ),
        ("[[cpus]]\nboot = 1", "vm.toml, line 1: cpus: is a list"),
        (
            "[[disk]]\nreadonly = true",
            "vm.toml, line 1: disk: `path` or `fd` or `socket` is missing",
        ),
        (
            "serial = \"ttty\"",
            "vm.toml, line 1: serial: `ttty` is not one of off, null, tty",
        ),
        (
            "serial = { file = \"a\", socket = \"b\" }",
            "vm.toml, line 1: serial: only one",
        ),
        (
            "device = [\"no-such-nic\"]",
            "vm.toml, line 1: device: `no-such-nic` is neither a PCI address",
        ),
    ] {
        let said = complaint(text);
        assert!(said.starts_with(expected), "{text:?} gave {said:?}");
    }
}

#[test]
fn what_is_no_toml_is_named_with_its_line() {
    let text = complaint("kernel = \"k\"\n[cpus\n");
    assert!(text.starts_with("vm.toml, line 2: "), "{text}");
    let text = complaint("kernel = \"k\"\nkernel = \"k\"\n");
    assert!(text.starts_with("vm.toml, line 2: duplicate key"), "{text}");
}

proptest::proptest! {
    #[test]
    fn no_text_is_too_odd(text: String) {
        let _config = read(&text);
    }
}
