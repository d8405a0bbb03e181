//! The words of a VM's configuration: which sections there are, which keys each has, and what a key's
//! value sets. Flags and `vm.toml` are two ways to say them, and both go through here.

use super::value::{Reason, Value};
use crate::config::{
    ConsoleConfig, CpusConfig, DeviceConfig, DiskConfig, MemoryConfig, NetConfig, OnError,
    PlatformConfig, RngConfig,
};
use busway_pci::ParseBdfError;
use busway_vfio::host::{Called, CalledError, SysRoot};

/// Puts a value where it belongs.
type Set<T> = fn(&mut T, &Value) -> Result<(), Reason>;

/// One `key=value` of a section.
pub(super) struct Key<T> {
    /// The word.
    pub(super) name: &'static str,
    /// What it sets.
    pub(super) set: Set<T>,
}

/// A flag, or a table of the file.
pub(super) struct Section<T: 'static> {
    /// The flag without its dashes; the table's name.
    pub(super) name: &'static str,
    /// A section of which nothing has been said.
    pub(super) blank: fn() -> T,
    /// Its keys.
    pub(super) keys: &'static [Key<T>],
    /// The keys of which one must be there; a value without a key counts as the first.
    pub(super) required: &'static [&'static str],
    /// What a value without a key sets, where there can be one.
    pub(super) bare: Option<Set<T>>,
    /// Only one thing can be said: each excludes the others.
    pub(super) single: bool,
}

impl<T> Section<T> {
    /// The key of that name.
    pub(super) fn key(&self, name: &str) -> Option<&'static Key<T>> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// The names of all keys.
    pub(super) fn names(&self) -> Vec<&'static str> {
        self.keys.iter().map(|key| key.name).collect()
    }
}

/// All that can stand at the top of the file.
pub(super) const TOP: &[&str] = &[
    "kernel",
    "initramfs",
    "cmdline",
    "cpus",
    "memory",
    "disk",
    "net",
    "rng",
    "serial",
    "console",
    "device",
    "platform",
];

/// `"word": |target, value| what it does;` for each key.
macro_rules! keys {
    ($($name:literal: |$target:ident, $value:ident| $set:expr;)*) => {
        &[$(Key {
            name: $name,
            set: |$target, $value| {
                $set;
                Ok(())
            },
        }),*]
    };
}

/// `--cpus`
pub(super) static CPUS: Section<CpusConfig> = Section {
    name: "cpus",
    blank: CpusConfig::default,
    keys: keys! {
        "boot": |cpus, value| cpus.boot = value.number()?;
        "max": |cpus, value| cpus.max = Some(value.number()?);
    },
    required: &[],
    bare: None,
    single: false,
};

/// `--memory`
pub(super) static MEMORY: Section<MemoryConfig> = Section {
    name: "memory",
    blank: MemoryConfig::default,
    keys: keys! {
        "size": |memory, value| memory.size = value.size()?;
        "shared": |memory, value| memory.shared = value.switch()?;
        "hugepages": |memory, value| memory.hugepages = value.switch()?;
        "hugepage_size": |memory, value| memory.hugepage_size = Some(value.size()?);
        "prefault": |memory, value| memory.prefault = Some(value.switch()?);
        "thp": |memory, value| memory.thp = value.switch()?;
    },
    required: &[],
    bare: None,
    single: false,
};

/// `--disk`
pub(super) static DISK: Section<DiskConfig> = Section {
    name: "disk",
    blank: || DiskConfig::new(""),
    keys: keys! {
        "path": |disk, value| disk.path = value.text()?.into();
        "readonly": |disk, value| disk.readonly = value.switch()?;
        "direct": |disk, value| disk.direct = value.switch()?;
        "num_queues": |disk, value| disk.num_queues = value.number()?;
        "queue_size": |disk, value| disk.queue_size = value.number()?;
        "id": |disk, value| disk.id = Some(value.text()?.to_owned());
    },
    required: &["path"],
    bare: None,
    single: false,
};

/// `--net`
pub(super) static NET: Section<NetConfig> = Section {
    name: "net",
    blank: NetConfig::default,
    keys: keys! {
        "tap": |net, value| net.tap = Some(value.text()?.to_owned());
        "mac": |net, value| net.mac = Some(value.text()?.to_owned());
        "num_queues": |net, value| net.num_queues = value.number()?;
        "queue_size": |net, value| net.queue_size = value.number()?;
        "id": |net, value| net.id = Some(value.text()?.to_owned());
    },
    required: &[],
    bare: None,
    single: false,
};

/// `--rng`
pub(super) static RNG: Section<RngConfig> = Section {
    name: "rng",
    blank: RngConfig::default,
    keys: keys! {"src": |rng, value| rng.src = value.text()?.into();
    },
    required: &[],
    bare: None,
    single: false,
};

/// `--serial`
pub(super) static SERIAL: Section<ConsoleConfig> = console("serial");

/// `--console`
pub(super) static CONSOLE: Section<ConsoleConfig> = console("console");

/// What a console can be without a key. The keys are here for the one who mistypes either.
const CONSOLES: &[&str] = &["off", "null", "tty", "pty", "file=PATH", "socket=PATH"];

const fn console(name: &'static str) -> Section<ConsoleConfig> {
    Section {
        name,
        blank: ConsoleConfig::default,
        keys: keys! {
            "file": |console, value| *console = ConsoleConfig::File(value.text()?.into());
            "socket": |console, value| *console = ConsoleConfig::Socket(value.text()?.into());
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
    }
}

/// `--device`
pub(super) static DEVICE: Section<DeviceConfig> = Section {
    name: "device",
    blank: || DeviceConfig {
        path: "".into(),
        fd: None,
        id: None,
        on_error: OnError::default(),
        vf_token: None,
        rom: None,
        romfile: None,
        x_nv_gpudirect_clique: None,
    },
    keys: keys! {
        "path": |device, value| set_device_path(device, value)?;
        "fd": |device, value| device.fd = Some(value.number()?);
        "id": |device, value| device.id = Some(value.text()?.to_owned());
        "on_error": |device, value| device.on_error = on_error(value)?;
        "vf_token": |device, value| device.vf_token = Some(value.text()?.to_owned());
        "rom": |device, value| device.rom = Some(value.switch()?);
        "romfile": |device, value| device.romfile = Some(value.text()?.into());
        "x_nv_gpudirect_clique": |device, value| device.x_nv_gpudirect_clique = Some(value.number()?);
    },
    required: &["path", "fd"],
    bare: Some(set_device_path),
    single: false,
};

fn set_device_path(device: &mut DeviceConfig, value: &Value) -> Result<(), Reason> {
    let text = value.text()?;
    let called: Called = text.parse()?;
    // A whole address means the same on any host; what else people say is looked up on this one.
    let found = called
        .find(&SysRoot::default())
        .map_err(|error| match error {
            CalledError::Nothing(_) => Reason::from(ParseBdfError(text.to_owned())),
            several => several.into(),
        })?;
    device.path = DeviceConfig::new(&found.to_string())?.path;
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
    blank: PlatformConfig::default,
    keys: keys! {
        "iommufd": |platform, value| platform.iommufd = value.choice()?;
        "iommufd_fd": |platform, value| platform.iommufd_fd = Some(value.number()?);
        "p2p": |platform, value| platform.p2p = value.choice()?;
        "vf_token": |platform, value| platform.vf_token = Some(value.text()?.to_owned());
    },
    required: &[],
    bare: None,
    single: false,
};
