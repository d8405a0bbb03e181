//! The words of a VM's configuration: which sections there are, which keys each has, and what a key's
//! value sets. Flags and `vm.toml` are two ways to say them, and both go through here.

use super::value::{Reason, Value};
use crate::config::{
    CONSOLE_FILE_SIZE, ConsoleConfig, DeviceConfig, HotplugMethod, MemoryConfig, OnError,
    PlatformConfig, RngConfig,
};
use crate::control::SocketAddress;
use busway_host::{Called, CalledError, SysRoot};
use busway_vfio::ParseHostNameError;

/// Puts a value where it belongs.
type Set<T> = fn(&mut T, &Value) -> Result<(), Reason>;

/// What can be written, and what it means; a line end begins another line of the help.
type Meaning = (&'static str, &'static str);

/// One `key=value` of a section.
pub(super) struct Key<T> {
    /// The word.
    pub(super) name: &'static str,
    /// What can stand after it.
    values: &'static [Meaning],
    /// What it sets.
    pub(super) set: Set<T>,
}

/// A flag, or a table of the file.
pub(super) struct Section<T: 'static> {
    /// The flag without its dashes; the table's name.
    pub(super) name: &'static str,
    /// The flag in one line of the help.
    pub(super) summary: &'static str,
    /// What can be said without a key.
    words: &'static [Meaning],
    /// What else is to be known of it; lines of the help.
    notes: &'static str,
    /// A section of which nothing has been said.
    pub(super) blank: fn() -> T,
    /// Its keys.
    pub(super) keys: &'static [Key<T>],
    /// The keys of which one must be there; a value without a key counts as the first.
    pub(super) required: &'static [&'static str],
    /// What a value without a key sets, where there can be one.
    pub(super) bare: Option<Set<T>>,
    /// Only one thing can be said: each excludes the others, but for `details`.
    pub(super) single: bool,
    /// Keys that say more of what another key says, and are applied after it.
    pub(super) details: &'static [&'static str],
}

impl<T> Section<T> {
    /// The key of that name.
    pub(super) fn key(&self, name: &str) -> Option<&'static Key<T>> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// What can be said, and what each of it means.
    pub(super) fn meanings(&self) -> Vec<(String, &'static str)> {
        let words = self
            .words
            .iter()
            .map(|&(word, text)| (word.to_owned(), text));
        let keys = self.keys.iter().flat_map(|key| {
            let shown = |&(value, text): &Meaning| (format!("{}={value}", key.name), text);
            key.values.iter().map(shown)
        });
        words.chain(keys).collect()
    }

    /// What else is to be known of it.
    pub(super) fn notes(&self) -> &'static str {
        self.notes
    }

    /// The whole help of the flag: a line for each thing that can be said.
    pub(super) fn help(&self) -> String {
        let lines = self.meanings();
        let widths = lines.iter().map(|(shown, _)| shown.len());
        let width = widths.filter(|&width| width <= WIDEST).max().unwrap_or(0);
        let mut help = format!("{}\n\n", self.summary);
        for (shown, text) in &lines {
            let mut column = shown.as_str();
            // What is too wide for the column has a line of its own.
            if shown.len() > WIDEST {
                help += &format!("  {shown}\n");
                column = "";
            }
            for line in text.lines() {
                help += &format!("  {column:width$}  {line}\n");
                column = "";
            }
        }
        if !self.notes.is_empty() {
            help += &format!("\n{}", self.notes);
        }
        help.trim_end().to_owned()
    }

    /// Whether the key says more of what another says.
    pub(super) fn is_detail(&self, name: &str) -> bool {
        self.details.contains(&name)
    }

    /// The names of all keys.
    pub(super) fn names(&self) -> Vec<&'static str> {
        self.keys.iter().map(|key| key.name).collect()
    }
}

/// All that can stand at the top of the file.
pub(super) const TOP: &[&str] = &[
    "kernel",
    "firmware",
    "initramfs",
    "cmdline",
    "cpus",
    "memory",
    "memory-zone",
    "numa",
    "place",
    "disk",
    "net",
    "fs",
    "pmem",
    "generic-vhost-user",
    "vsock",
    "balloon",
    "watchdog",
    "pvpanic",
    "tpm",
    "rng",
    "serial",
    "console",
    "device",
    "platform",
    "landlock",
    "landlock-rules",
    "jail",
    "user",
];

/// The widest that stands in the column of what can be said.
const WIDEST: usize = 18;

/// `"word" { "VALUE": "what it means" } |target, value| what it does;` for each key.
macro_rules! keys {
    ($($name:literal { $($shown:literal: $text:expr),* } |$target:ident, $value:ident| $set:expr;)*) => {
        &[$(Key {
            name: $name,
            values: &[$(($shown, $text)),*],
            set: |$target, $value| {
                $set;
                Ok(())
            },
        }),*]
    };
}

mod balloon;
mod cpus;
mod disk;
mod firmware;
mod fs;
mod generic;
mod landlock;
mod net;
mod numa;
mod pmem;
mod tpm;
mod vsock;

pub(super) use balloon::BALLOON;
pub(super) use cpus::CPUS;
pub(super) use disk::DISK;
pub(super) use firmware::FIRMWARE;
pub(super) use fs::FS;
pub(super) use generic::GENERIC;
pub(super) use landlock::LANDLOCK_RULES;
pub(super) use net::NET;
pub(super) use numa::{MEMORY_ZONE, NUMA};
pub(super) use pmem::PMEM;
pub(super) use tpm::TPM;
pub(super) use vsock::VSOCK;

/// `--memory`
pub(super) static MEMORY: Section<MemoryConfig> = Section {
    name: "memory",
    summary: "RAM: size=SIZE[,shared=on|off][,hugepages=on|off]…",
    words: &[],
    notes: "\
RAM that comes needs Linux 5.8 in the guest, with its module virtio_mem, and
`memhp_default_state=online_movable` on its command line where RAM is to go again.
Beside assigned devices, locked memory is needed for all that can come.",
    blank: MemoryConfig::default,
    keys: keys! {
        "size" { "SIZE": "bytes, or with K, M, G or T after it [512M]" }
            |memory, value| memory.size = value.size()?;
        "shared" { "on|off": "mapped so that another process can map it too [on with --fs,\n\
                 vhost_user=on and --generic-vhost-user, else off]" }
            |memory, value| memory.shared = value.switch()?;
        "hugepages" { "on|off": "taken from hugetlbfs [off]" }
            |memory, value| memory.hugepages = value.switch()?;
        "hugepage_size" { "SIZE": "size of a huge page [the host's default]" }
            |memory, value| memory.hugepage_size = Some(value.size()?);
        "prefault" { "on|off": "touched before the guest starts [on with --device]" }
            |memory, value| memory.prefault = Some(value.switch()?);
        "thp" { "on|off": "transparent huge pages [on]" }
            |memory, value| memory.thp = value.switch()?;
        "hotplug_size" { "SIZE": "RAM beside it that can come while the guest runs, a multiple of 128M\n\
                 (`busway ctl resize --memory`) [0]" }
            |memory, value| memory.hotplug_size = Some(value.size()?);
        "hotplug_method" { "virtio-mem": "it comes and goes by blocks, as the guest's driver plugs them", "acpi": "not yet, but for Cloud Hypervisor's clients: kept and shown [acpi]" }
            |memory, value| memory.hotplug_method = hotplug_method(value)?;
        "hotplugged_size" { "SIZE": "what of it the guest is to have from its start on [0]" }
            |memory, value| memory.hotplugged_size = Some(value.size()?);
    },
    required: &[],
    bare: None,
    single: false,
    details: &[],
};

/// The words of [`HotplugMethod`].
const HOTPLUG_METHODS: &[&str] = &["acpi", "virtio-mem"];

fn hotplug_method(value: &Value) -> Result<HotplugMethod, Reason> {
    let methods = [HotplugMethod::Acpi, HotplugMethod::VirtioMem];
    let text = value.text()?;
    let method = methods.into_iter().find(|method| method.word() == text);
    method.ok_or_else(|| Reason::Word {
        value: text.to_owned(),
        words: HOTPLUG_METHODS,
    })
}

/// `--rng`
pub(super) static RNG: Section<RngConfig> = Section {
    name: "rng",
    summary: "Virtio entropy device: src=FILE[,bw_size=SIZE]… [default: src=/dev/urandom]",
    words: &[],
    notes: "",
    blank: RngConfig::default,
    keys: keys! {
        "src" { "FILE": "where entropy comes from [/dev/urandom]" }
            |rng, value| rng.src = value.text()?.into();
        "bw_size" { "SIZE": "bytes of the limit that the guest is held to [none]" }
            |rng, value| rng.bw_size = Some(value.size()?);
        "bw_one_time_burst" { "SIZE": "bytes beside it, once [0]" }
            |rng, value| rng.bw_one_time_burst = Some(value.size()?);
        "bw_refill_time" { "TIME": "milliseconds in which they come back" }
            |rng, value| rng.bw_refill_time = Some(value.number()?);
    },
    required: &[],
    bare: None,
    single: false,
    details: &[],
};

/// `--serial`
pub(super) static SERIAL: Section<ConsoleConfig> = console(
    "serial",
    "Serial port: off|null|tty|pty|file=PATH|socket=PATH [default: tty]",
);

/// `--console`
pub(super) static CONSOLE: Section<ConsoleConfig> =
    console("console", "Virtio console: as --serial [default: off]");

/// What a console can be without a key. The keys are here for the one who mistypes either.
const CONSOLES: &[&str] = &["off", "null", "tty", "pty", "file=PATH", "socket=PATH"];

const fn console(name: &'static str, summary: &'static str) -> Section<ConsoleConfig> {
    Section {
        name,
        summary,
        words: &[
            ("off", "no such device"),
            ("null", "output goes nowhere"),
            ("tty", "this terminal; Ctrl-A x ends the guest"),
            ("pty", "a new pseudo-terminal, whose name is printed"),
        ],
        notes: "",
        blank: ConsoleConfig::default,
        keys: keys! {
            "file" { "PATH": "output to a file of the user's own, which is emptied first" }
            |console, value| *console = ConsoleConfig::File {
                path: value.text()?.into(),
                size: match console {
                    ConsoleConfig::File { size, .. } => *size,
                    _ => CONSOLE_FILE_SIZE,
                },
            };
            "size" { "SIZE": "with file=: when it is so large, it becomes PATH.1 and begins anew [16M]" }
            |console, value| match console {
                ConsoleConfig::File { size, .. } => *size = value.size()?,
                _ => return Err(Reason::NoFile),
            };
            "socket" { "PATH": "a Unix socket that listens" }
            |console, value| *console = ConsoleConfig::Socket(value.text()?.into());
        },
        required: &[],
        bare: Some(|console, value| {
            *console = match value {
                Value::Switch(false) => ConsoleConfig::Off,
                Value::Text(word) if word == "off" => ConsoleConfig::Off,
                Value::Text(word) if word == "null" => ConsoleConfig::Null,
                Value::Text(word) if word == "tty" => ConsoleConfig::Tty,
                Value::Text(word) if word == "pty" => ConsoleConfig::Pty,
                other => {
                    return Err(Reason::Word {
                        value: other.to_string(),
                        words: CONSOLES,
                    });
                }
            };
            Ok(())
        }),
        single: true,
        details: &["size"],
    }
}

/// `--device`
pub(super) static DEVICE: Section<DeviceConfig> = Section {
    name: "device",
    summary: "Host device, bound to vfio-pci or mediated: ADDRESS|UUID[,id=NAME][,on_error=…]…",
    words: &[],
    notes: "\
Functions of one host device become one device of the guest's.
`busway device list` shows what there is, `busway device bind ADDRESS` prepares one.",
    blank: || DeviceConfig {
        path: "".into(),
        fd: None,
        id: None,
        on_error: OnError::default(),
        vf_token: None,
        rom: None,
        romfile: None,
        x_nv_gpudirect_clique: None,
        boot_index: None,
        root_port: None,
        pci_segment: 0,
        pci_device_id: None,
    },
    keys: keys! {
        "path" { "PATH": "address (0000:01:00.0, 01:00.0), a mediated device's UUID, or folder in\n\
                 sysfs; needs no `path=`" }
            |device, value| set_device_path(device, value)?;
        "fd" { "N": "a descriptor that Busway inherits, in place of opening the device: of\n\
                 its /dev/vfio/devices/vfioN, or of its group's /dev/vfio/N (with path=,\n\
                 where the group has several devices)" }
            |device, value| device.fd = Some(value.number()?);
        "id" { "NAME": "name, unique in the VM" }
            |device, value| device.id = Some(value.text()?.to_owned());
        "on_error" { "stop": "an uncorrectable error of the device's ends the VM [stop]", "pause": "it pauses the guest; `busway ctl resume` lets it go on, SIGTERM ends it", "ignore": "it is logged" }
            |device, value| device.on_error = on_error(value)?;
        "vf_token" { "UUID": "what all share who use a physical function and its virtual\n\
                 functions, where VFIO has both" }
            |device, value| device.vf_token = Some(value.text()?.to_owned());
        "rom" { "on|off": "the guest gets the expansion ROM [on, unless it is known to do harm]" }
            |device, value| device.rom = Some(value.switch()?);
        "romfile" { "FILE": "an expansion ROM in place of the device's" }
            |device, value| device.romfile = Some(value.text()?.into());
        "x_nv_gpudirect_clique" { "N": "GPUs of NVIDIA's with the same N, 0 to 15, copy to each other directly" }
            |device, value| device.x_nv_gpudirect_clique = Some(value.number()?);
        "boot_index" { "N": "what firmware boots from, the lowest first" }
            |device, value| device.boot_index = Some(value.number()?);
        "root_port" { "on": "behind a PCIe root port of its own [as --platform root_ports=]", "off": "on bus 0 by itself, integrated into the root complex" }
            |device, value| device.root_port = Some(value.switch()?);
        "pci_segment" { "N": "the PCI segment that it is in [0]" }
            |device, value| device.pci_segment = value.number()?;
        "pci_device_id" { "N": "its root port's device number on bus 0 there, 1 to 31, or with\n\
                 root_port=off its own, 1 to 15 [any that is free]" }
            |device, value| device.pci_device_id = Some(value.number()?);
    },
    required: &["path", "fd"],
    bare: Some(set_device_path),
    single: false,
    details: &[],
};

fn set_device_path(device: &mut DeviceConfig, value: &Value) -> Result<(), Reason> {
    let text = value.text()?;
    let no_name = || Reason::from(ParseHostNameError(text.to_owned()));
    let called: Called = text.parse().map_err(|_nothing| no_name())?;
    // A whole name means the same on any host; what else people say is looked up on this one.
    let found = match called.find(&SysRoot::default()) {
        Ok(address) => address.to_string(),
        Err(CalledError::Mediated(uuid)) => uuid.to_string(),
        Err(CalledError::Nothing(_)) => return Err(no_name()),
        Err(several) => return Err(several.into()),
    };
    device.path = DeviceConfig::new(&found)?.path;
    Ok(())
}

/// What an error can do.
const ON_ERROR: &[&str] = &["stop", "pause", "ignore"];

fn on_error(value: &Value) -> Result<OnError, Reason> {
    match value {
        Value::Text(word) if word == "stop" => Ok(OnError::Stop),
        Value::Text(word) if word == "pause" => Ok(OnError::Pause),
        Value::Text(word) if word == "ignore" => Ok(OnError::Ignore),
        other => Err(Reason::Word {
            value: other.to_string(),
            words: ON_ERROR,
        }),
    }
}

/// `--platform`
pub(super) static PLATFORM: Section<PlatformConfig> = Section {
    name: "platform",
    summary: "How devices are reached, and which machine it is: iommufd=on|off|auto[,p2p=on|off|auto]… [default: iommufd=auto]",
    words: &[],
    notes: "",
    blank: PlatformConfig::default,
    keys: keys! {
        "iommufd" { "on": "by iommufd and the device's cdev", "off": "by the VFIO group and a type1 container", "auto": "by iommufd where that does what p2p= says, else as off [auto]" }
            |platform, value| platform.iommufd = value.choice()?;
        "iommufd_fd" { "N": "an iommufd that Busway inherits, instead of opening /dev/iommu" }
            |platform, value| platform.iommufd_fd = Some(value.number()?);
        "p2p" { "on": "devices reach each other's memory (peer-to-peer DMA), or an error\n\
                 names the BARs out of reach", "off": "they do not", "auto": "they do where the host can: by type1, and by iommufd (Linux 6.19);\n\
                 BARs out of reach are named once [auto]" }
            |platform, value| platform.p2p = value.choice()?;
        "vf_token" { "UUID": "that of each device which needs one and has none of its own" }
            |platform, value| platform.vf_token = Some(value.text()?.to_owned());
        "hotplug_slots" { "N": "empty slots for devices that are added later, 0 to 15\n\
                 [8 with --api-socket, else 0]" }
            |platform, value| platform.hotplug_slots = Some(value.number()?);
        "hotplug_mmio64" { "SIZE": "room above RAM for the memory of what comes into such a slot [4G]" }
            |platform, value| platform.hotplug_mmio64 = Some(value.size()?);
        "num_pci_segments" { "N": "PCI segments with addresses and buses of their own, 1 to 16;\n\
                 one with firmware [1]" }
            |platform, value| platform.num_pci_segments = Some(value.number()?);
        "segment_hotplug_slots" { "N": "empty slots of each segment but the first, 0 to 15\n\
                 [1 with --api-socket, else 0]" }
            |platform, value| platform.segment_hotplug_slots = Some(value.number()?);
        "root_ports" { "on": "devices are behind PCIe root ports [for `busway run`]", "off": "those of one function are on bus 0 [for Cloud Hypervisor's clients,\n\
                 which look for them there]" }
            |platform, value| platform.root_ports = Some(value.switch()?);
        "removal_timeout" { "N": "seconds that the guest has to release a device, 1 to 3600 [30]" }
            |platform, value| platform.removal_timeout = Some(value.number()?);
        "power_off_timeout" { "N": "seconds that the guest has to power off after the first signal, 1 to 3600 [20]" }
            |platform, value| platform.power_off_timeout = Some(value.number()?);
        "serial_number" { "TEXT": "the machine's serial number, as the guest is told by SMBIOS" }
            |platform, value| platform.serial_number = Some(value.text()?.to_owned());
        "uuid" { "UUID": "the machine's UUID, likewise" }
            |platform, value| platform.uuid = Some(value.text()?.to_owned());
        "oem_strings" { "[TEXT,…]": "strings that programs in the guest look for there, such as systemd's\n\
                 credentials" }
            |platform, value| platform.oem_strings = value.texts()?;
    },
    required: &[],
    bare: None,
    single: false,
    details: &[],
};

/// `--api-socket`, which the file has no word for: it is this process's and not the VM's.
pub(super) static API_SOCKET: Section<SocketAddress> = Section {
    name: "api-socket",
    summary: "Control socket, for `busway ctl` and Cloud Hypervisor's clients: PATH|fd=N",
    words: &[],
    notes: "",
    blank: || SocketAddress::Path("".into()),
    keys: keys! {
        "path" { "PATH": "where it is made, for this user alone, with a lock beside it (PATH.lock);\n\
                 needs no `path=`. What a killed VM left is replaced; a VM that lives keeps its own" }
            |socket, value| *socket = SocketAddress::Path(value.text()?.into());
        "fd" { "N": "a Unix socket that Busway inherits and that listens already" }
            |socket, value| *socket = SocketAddress::Fd(value.number()?);
    },
    required: &["path", "fd"],
    bare: Some(|socket, value| {
        *socket = SocketAddress::Path(value.text()?.into());
        Ok(())
    }),
    single: true,
    details: &[],
};

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::*;
    use crate::config::VmConfig;

    /// The words of a section are the fields of what it sets, and the help has each.
    #[track_caller]
    fn agrees<T: Serialize>(section: &Section<T>) {
        let config = serde_json::to_value((section.blank)()).unwrap();
        let mut fields: Vec<_> = config.as_object().unwrap().keys().cloned().collect();
        let mut names = section.names();
        fields.sort();
        names.sort_unstable();
        assert_eq!(names, fields, "{}", section.name);
        let help = section.help();
        for name in names {
            assert!(help.contains(&format!("\n  {name}=")), "{name} in {help}");
        }
    }

    #[test]
    fn keys_are_the_fields_of_the_configuration_and_all_are_in_the_help() {
        agrees(&FIRMWARE);
        agrees(&CPUS);
        agrees(&MEMORY);
        agrees(&MEMORY_ZONE);
        agrees(&NUMA);
        agrees(&DISK);
        agrees(&NET);
        agrees(&FS);
        agrees(&PMEM);
        agrees(&TPM);
        agrees(&BALLOON);
        agrees(&RNG);
        agrees(&DEVICE);
        agrees(&LANDLOCK_RULES);
        agrees(&PLATFORM);
        let vm = serde_json::to_value(VmConfig::default()).unwrap();
        let mut fields: Vec<_> = vm.as_object().unwrap().keys().map(String::as_str).collect();
        let mut top = TOP.to_vec();
        fields.sort_unstable();
        top.sort_unstable();
        assert_eq!(top, fields);
    }

    #[test]
    fn a_console_is_what_its_help_says() {
        let help = SERIAL.help();
        for word in CONSOLES {
            assert!(help.contains(&format!("\n  {word} ")), "{word} in {help}");
        }
    }
}
