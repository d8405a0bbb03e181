//! `busway ctl`: the control socket of a VM that runs, for people.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use busway_iommu::printable;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::failure::Failure;
use super::style::{Screen, Style, write_out};
use super::text::fold;
use crate::config::MAX_REMOVAL_TIMEOUT;
use crate::control::client::{self, ClientError};
use crate::exit::RUNTIME;

/// How long a VM has to answer.
const LIMIT: Duration = Duration::from_secs(10);
/// How long it has to end, and for what the kernel does to a device: that waits a minute for one that does not
/// come back from its reset.
const END_LIMIT: Duration = Duration::from_secs(120);

/// `busway ctl`
#[derive(Args, Clone, Debug)]
pub(super) struct CtlArgs {
    /// The socket that the VM's `busway run --api-socket` was given
    #[arg(long, global = true, value_name = "PATH")]
    api_socket: Option<PathBuf>,

    /// Print what the VM answers, as JSON
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    verb: Verb,
}

/// What can be asked of a VM.
#[derive(Subcommand, Clone, Debug, PartialEq, Eq)]
enum Verb {
    /// Show what the VM is made of, and what it is doing
    Info,
    /// Ask whether the VM answers
    Ping,
    /// Stop the guest between two instructions
    Pause,
    /// Let a guest that was paused go on
    Resume,
    /// Press the guest's power button: its system decides what follows
    PowerButton,
    /// End the VM without asking its guest, as if the power were cut
    Shutdown,
    /// Add a host device, which VFIO has, in an empty slot; answered when it is there
    AddDevice {
        /// Its address (0000:01:00.0), a mediated device's UUID, or its folder in sysfs; several are functions of
        /// one device, and stay together
        #[arg(required = true, value_name = "DEVICE")]
        devices: Vec<String>,
        /// What it is called, or the first of several
        #[arg(long)]
        id: Option<String>,
    },
    /// Add a disk; answered when the guest can find it
    AddDisk(AddDiskArgs),
    /// Add a NIC; answered when the guest can find it
    AddNet(AddNetArgs),
    /// Have the guest release a device and all in its slot; answered when the host has it back
    RemoveDevice {
        /// What it is called: its name, or its address or UUID on the host where it has none
        id: String,
        /// Pull it out where the guest does not release it
        #[arg(long)]
        force: bool,
        /// How long the guest has to release it, 1 to 3600; what `--platform removal_timeout=` said, or 30, where
        /// nothing is given
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_REMOVAL_TIMEOUT)))]
        timeout: Option<u32>,
    },
}

/// `busway ctl add-disk`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
struct AddDiskArgs {
    /// An image, or a block device
    path: PathBuf,
    /// The image is qcow2; one is raw otherwise, whatever is in it
    #[arg(long)]
    qcow2: bool,
    /// Open the files that a qcow2 image names, to be read only
    #[arg(long, requires = "qcow2")]
    backing_files: bool,
    /// The guest may not write
    #[arg(long)]
    readonly: bool,
    /// Bypass the host's page cache
    #[arg(long)]
    direct: bool,
    /// The serial number that the guest sees; its id, where none is given
    #[arg(long)]
    serial: Option<String>,
    /// What it is called
    #[arg(long)]
    id: Option<String>,
}

/// `busway ctl add-net`
#[derive(Args, Clone, Debug, PartialEq, Eq)]
struct AddNetArgs {
    /// The tap interface; a new one that the kernel names, where none is given
    tap: Option<String>,
    /// The guest's MAC address; a random one, where none is given
    #[arg(long)]
    mac: Option<String>,
    /// What it is called
    #[arg(long)]
    id: Option<String>,
}

/// At the end of the help.
pub(super) const EXIT_STATUS: &str = "\
Exit status: 0 it is done; 1 the VM refused, or did not answer in time (10 s; 2 minutes to end or
to add a device, and to remove one beside the time that the guest has for it); 2 bad usage, or no
VM's socket has this name.";

impl Verb {
    const fn method(&self) -> &'static str {
        match self {
            Self::Info | Self::Ping => "GET",
            _ => "PUT",
        }
    }

    const fn endpoint(&self) -> &'static str {
        match self {
            Self::Info => "vm.info",
            Self::Ping => "vmm.ping",
            Self::Pause => "vm.pause",
            Self::Resume => "vm.resume",
            Self::PowerButton => "vm.power-button",
            Self::Shutdown => "vmm.shutdown",
            Self::AddDevice { .. } => "vm.add-device",
            Self::AddDisk(_) => "vm.add-disk",
            Self::AddNet(_) => "vm.add-net",
            Self::RemoveDevice { .. } => "vm.remove-device",
        }
    }

    /// What is said beside the endpoint.
    fn body(&self) -> Option<Value> {
        match self {
            Self::AddDevice { devices, id } => {
                let (first, rest) = devices.split_first()?;
                let functions = rest.iter().map(|path| json!({ "path": path }));
                let functions: Vec<_> = functions.collect();
                let body = json!({ "path": first, "id": id, "functions": functions });
                Some(body)
            }
            Self::AddDisk(disk) => Some(json!({
                "path": absolute(&disk.path), "readonly": disk.readonly, "direct": disk.direct,
                "image_type": if disk.qcow2 { "Qcow2" } else { "Raw" },
                "backing_files": disk.backing_files, "serial": disk.serial, "id": disk.id,
            })),
            Self::AddNet(net) => Some(json!({ "tap": net.tap, "mac": net.mac, "id": net.id })),
            Self::RemoveDevice { id, force, timeout } => {
                let mut body = json!({ "id": id, "force": force, "wait": true });
                if let Some(seconds) = timeout {
                    body["timeout_s"] = json!(seconds);
                }
                Some(body)
            }
            _ => None,
        }
    }

    const fn limit(&self) -> Duration {
        match self {
            Self::Shutdown
            | Self::AddDevice { .. }
            | Self::AddDisk(_)
            | Self::AddNet(_)
            | Self::RemoveDevice { .. } => END_LIMIT,
            _ => LIMIT,
        }
    }

    /// The same with the time that the guest has, where that is known to the VM alone: it is asked for it.
    fn limit_of(&self, socket: &Path) -> Result<Duration, ClientError> {
        let guest = match self {
            Self::RemoveDevice {
                timeout: Some(seconds),
                ..
            } => (*seconds).into(),
            Self::RemoveDevice { timeout: None, .. } => {
                let info = client::ask(socket, "GET", "vm.info", None, LIMIT)?;
                number(&info, "/config/platform/removal_timeout_s")
            }
            _ => 0,
        };
        // Nobody waits for ever for what calls itself a VM.
        let guest = Duration::from_secs(guest.min(MAX_REMOVAL_TIMEOUT.into()));
        Ok(self.limit().saturating_add(guest))
    }
}

/// The path as the VM finds it, whose folder may be another; as it is where there is no such path, which the
/// VM then says.
fn absolute(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.display().to_string()
}

/// Asks a VM, and prints what it answers.
pub(super) fn run(args: &CtlArgs) -> Result<(), Failure> {
    let socket = args
        .api_socket
        .as_deref()
        .ok_or("no socket: name the VM's with --api-socket PATH, as its `busway run` was given it")
        .map_err(Failure::usage)?;
    let verb = &args.verb;
    let body = verb.body();
    let answer = verb.limit_of(socket).and_then(|limit| {
        let (method, endpoint) = (verb.method(), verb.endpoint());
        client::ask(socket, method, endpoint, body.as_ref(), limit)
    });
    let answer = answer.map_err(|error: ClientError| Failure::new(error.exit_status(), error))?;
    let text = match args.json {
        true => pretty(answer),
        false => show(verb, &answer, Screen::of_stdout()),
    };
    let mut out = io::stdout().lock();
    write_out(&mut out, &text)
        .context("cannot write the result")
        .map_err(|error| Failure::explained(RUNTIME, error))
}

/// Where there is nothing to say, an object without anything in it.
fn pretty(answer: Value) -> String {
    let answer = match answer {
        Value::Null => json!({}),
        answer => answer,
    };
    format!("{answer:#}\n")
}

/// What a person reads of an answer.
fn show(verb: &Verb, answer: &Value, screen: Screen) -> String {
    match verb {
        Verb::Info => table(&rows(answer), screen),
        Verb::Ping => {
            let version = text(answer, "/version");
            let pid = number(answer, "/pid");
            format!("version {version} answers, as process {pid}\n")
        }
        Verb::Pause => "the guest is paused\n".to_owned(),
        Verb::Resume => "the guest runs\n".to_owned(),
        Verb::PowerButton => "the power button is pressed\n".to_owned(),
        Verb::Shutdown => "the VM has ended\n".to_owned(),
        Verb::AddDevice { .. } | Verb::AddDisk(_) | Verb::AddNet(_) => {
            let all = std::iter::once(answer).chain(list(answer, "/functions"));
            let heard = match answer["attended"].as_bool() {
                Some(false) => {
                    "; the guest has no driver for the slot, or none yet, and finds the device when it has one"
                }
                _ => "",
            };
            let line = |one| {
                let (id, address) = (text(one, "/id"), text(one, "/bdf"));
                format!("{id}: in the guest at {address}{heard}\n")
            };
            all.map(line).collect()
        }
        Verb::RemoveDevice { id, .. } => {
            let ids: Vec<_> = list(answer, "/ids").iter().map(|id| text(id, "")).collect();
            match ids.is_empty() {
                true => format!("{}: the host has it back\n", printable(id)),
                false => format!("{}: the host has them back\n", ids.join(" and ")),
            }
        }
    }
}

/// A line of the table: what it is of, and what it says.
type Row = (&'static str, String);

/// What a VM is made of.
fn rows(info: &Value) -> Vec<Row> {
    let mut rows = vec![("state", state(info)), ("memory", memory(info))];
    let processors = number(info, "/config/cpus/boot_vcpus");
    rows.push(("processors", processors.to_string()));
    for part in ["kernel", "initramfs", "cmdline"] {
        let said = text(info, &format!("/config/payload/{part}"));
        if !said.is_empty() {
            rows.push((part, said));
        }
    }
    for part in ["serial", "console"] {
        let console = &info["config"][part];
        let words = [
            text(console, "/mode").to_lowercase(),
            text(console, "/file"),
        ];
        rows.push((
            part,
            joined(words.into_iter().chain([text(console, "/socket")])),
        ));
    }
    for disk in list(info, "/config/disks") {
        let readonly = disk["readonly"] == true;
        let (id, place) = (text(disk, "/id"), in_guest(info, disk));
        let notes = [
            text(disk, "/path"),
            named(id),
            note("read-only", readonly),
            place,
        ];
        rows.push(("disk", joined(notes)));
    }
    for nic in list(info, "/config/net") {
        let tap = match text(nic, "/tap") {
            tap if tap.is_empty() => "a new tap".to_owned(),
            tap => tap,
        };
        rows.push((
            "nic",
            joined([
                tap,
                text(nic, "/mac"),
                named(text(nic, "/id")),
                in_guest(info, nic),
            ]),
        ));
    }
    rows.extend(devices(info));
    if let Some(slots @ 1..) = info["empty_slots"].as_u64() {
        rows.push(("slots", format!("{slots} empty")));
    }
    rows
}

fn state(info: &Value) -> String {
    match text(info, "/state") {
        _ if info["held"] == true => "held: a device had an error (on_error=pause)".to_owned(),
        created if created == "Created" => "not booted, or being put together".to_owned(),
        state => state.to_lowercase(),
    }
}

fn memory(info: &Value) -> String {
    let bytes = number(info, "/memory_actual_size");
    format!("{} MiB", bytes >> 20)
}

/// Where the guest has a virtio device, if it has it yet.
fn in_guest(info: &Value, device: &Value) -> String {
    let id = device["id"].as_str().unwrap_or_default();
    let node = info["device_tree"].get(id);
    match node.map(|node| text(node, "/pci_bdf")) {
        Some(address) if !address.is_empty() => format!("in the guest {address}"),
        _ => String::new(),
    }
}

/// The host's devices that the guest has; before it has any, those that it is to have.
fn devices(info: &Value) -> Vec<Row> {
    let there = info["device_tree"].as_object().into_iter().flatten();
    let there: Vec<Row> = there
        .filter(|(_, node)| node.get("host_bdf").is_some())
        .map(|(id, node)| {
            let (host, guest) = (text(node, "/host_bdf"), text(node, "/pci_bdf"));
            let name = if *id == host {
                String::new()
            } else {
                named(id.clone())
            };
            (
                "device",
                joined([host, name, format!("in the guest {guest}")]),
            )
        })
        .collect();
    if !there.is_empty() || info["state"] != "Created" {
        return there;
    }
    let wanted = list(info, "/config/devices").iter().map(|device| {
        let path = text(device, "/path");
        let address = path.trim_end_matches('/').rsplit('/').next();
        let address = address.unwrap_or_default().to_owned();
        ("device", joined([address, named(text(device, "/id"))]))
    });
    wanted.collect()
}

/// The words that are there, with commas.
fn joined(words: impl IntoIterator<Item = String>) -> String {
    let words = words.into_iter().filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(", ")
}

fn note(word: &str, applies: bool) -> String {
    if applies {
        word.to_owned()
    } else {
        String::new()
    }
}

fn named(id: String) -> String {
    if id.is_empty() {
        id
    } else {
        format!("id {id}")
    }
}

/// A text of the answer's, empty where there is none. What a VM is called, others have chosen.
fn text(value: &Value, pointer: &str) -> String {
    let text = value.pointer(pointer).and_then(Value::as_str);
    printable(text.unwrap_or_default())
}

fn number(value: &Value, pointer: &str) -> u64 {
    value
        .pointer(pointer)
        .and_then(Value::as_u64)
        .unwrap_or_default()
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    let list = value.pointer(pointer).and_then(Value::as_array);
    list.map(Vec::as_slice).unwrap_or_default()
}

/// The names of rows in a column, what they say beside it, in as many lines as the screen needs.
fn table(rows: &[Row], screen: Screen) -> String {
    let widest = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let indent = widest.saturating_add(2);
    let width = screen.width.unwrap_or(usize::MAX).saturating_sub(indent);
    let mut table = String::new();
    for (name, said) in rows {
        let style = match (*name, said.as_str()) {
            ("state", "running") => Style::GOOD,
            ("state", _) => Style::WARN,
            _ => Style::PLAIN,
        };
        for (index, line) in fold(said, width).into_iter().enumerate() {
            let name = if index == 0 { name } else { "" };
            let line = style.paint(line, screen.colour);
            table += &format!("{name:indent$}{line}\n");
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> Value {
        json!({
            "state": "Running",
            "memory_actual_size": 8_u64 << 30,
            "config": {
                "cpus": { "boot_vcpus": 4 },
                "payload": { "kernel": "/boot/vmlinuz", "cmdline": "console=ttyS0 root=/dev/vda1" },
                "serial": { "mode": "Tty" },
                "console": { "mode": "File", "file": "/run/console" },
                "disks": [{ "path": "debian.raw", "id": "root", "readonly": true }],
                "net": [{ "tap": "vmtap0" }, {}],
                "devices": [
                    { "path": "/sys/bus/pci/devices/0000:01:00.0", "id": "drive" },
                    { "path": "/sys/bus/pci/devices/0000:02:00.0/" },
                ],
            },
            "device_tree": {
                "drive": { "host_bdf": "0000:01:00.0", "pci_bdf": "0000:01:00.0" },
                "0000:02:00.0": { "host_bdf": "0000:02:00.0", "pci_bdf": "0000:02:00.0" },
                "root": { "pci_bdf": "0000:00:01.0" },
            },
        })
    }

    #[test]
    fn info_is_a_table() {
        let expected = "\
state       running
memory      8192 MiB
processors  4
kernel      /boot/vmlinuz
cmdline     console=ttyS0 root=/dev/vda1
serial      tty
console     file, /run/console
disk        debian.raw, id root, read-only, in the guest 0000:00:01.0
nic         vmtap0
nic         a new tap
device      0000:02:00.0, in the guest 0000:02:00.0
device      0000:01:00.0, id drive, in the guest 0000:01:00.0
";
        let shown = show(&Verb::Info, &info(), Screen::default());
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_device_whose_slot_no_driver_attends_to_is_said_to_wait_for_one() {
        let said = |answer| {
            let verb = Verb::AddDevice {
                devices: vec!["01:00.0".into()],
                id: None,
            };
            show(&verb, &answer, Screen::default())
        };
        let plain = json!({ "id": "drive", "bdf": "0000:03:00.0" });
        assert_eq!(said(plain), "drive: in the guest at 0000:03:00.0\n");
        let waits = json!({ "id": "drive", "bdf": "0000:03:00.0", "attended": false });
        assert_eq!(
            said(waits),
            "drive: in the guest at 0000:03:00.0; the guest has no driver for the slot, or none yet, and finds \
             the device when it has one\n"
        );
    }

    #[test]
    fn empty_slots_are_counted_where_there_are_some() {
        let mut info = info();
        for (slots, ends) in [(0, "0000:01:00.0\n"), (3, "\nslots       3 empty\n")] {
            info["empty_slots"] = slots.into();
            let shown = show(&Verb::Info, &info, Screen::default());
            assert!(shown.ends_with(ends), "{shown}");
        }
    }

    #[test]
    fn a_narrow_screen_has_long_lines_folded() {
        let shown = show(&Verb::Info, &info(), Some(32).into());
        assert!(
            shown.contains("cmdline     console=ttyS0\n            root=/dev/vda1\n"),
            "{shown}"
        );
    }

    #[test]
    fn a_vm_that_is_being_put_together_shows_what_it_is_to_have() {
        let mut info = info();
        info["state"] = "Created".into();
        info["device_tree"] = json!({});
        let shown = show(&Verb::Info, &info, Screen::default());
        assert!(shown.starts_with("state       not booted, or being put together\n"));
        assert!(shown.ends_with("device      0000:01:00.0, id drive\ndevice      0000:02:00.0\n"));
    }

    #[test]
    fn a_guest_that_is_held_is_told_from_one_that_was_paused() {
        let state = |info: Value| state(&info);
        assert_eq!(state(json!({ "state": "Paused" })), "paused");
        let held = state(json!({ "state": "Paused", "held": true }));
        assert!(held.starts_with("held: "), "{held}");
    }

    #[test]
    fn an_answer_of_another_form_is_no_harm_and_steers_no_terminal() {
        for answer in [
            Value::Null,
            json!([]),
            json!({ "config": 1, "device_tree": [] }),
        ] {
            for verb in [Verb::Info, Verb::Ping] {
                assert!(show(&verb, &answer, Screen::default()).ends_with('\n'));
            }
        }
        let shown = show(
            &Verb::Info,
            &json!({ "state": "\u{1b}[2J" }),
            Screen::default(),
        );
        assert!(!shown.contains('\u{1b}'), "{shown:?}");
    }

    #[test]
    fn functions_come_by_one_request_and_leave_together() {
        let verb = Verb::AddDevice {
            devices: vec!["01:00.0".into(), "01:00.1".into()],
            id: Some("card".into()),
        };
        let body = json!({
            "path": "01:00.0", "id": "card", "functions": [{ "path": "01:00.1" }],
        });
        assert_eq!(verb.body(), Some(body));
        let answer = json!({
            "id": "card", "bdf": "0000:03:00.0",
            "functions": [{ "id": "0000:01:00.1", "bdf": "0000:03:00.1" }],
        });
        assert_eq!(
            show(&verb, &answer, Screen::default()),
            "card: in the guest at 0000:03:00.0\n0000:01:00.1: in the guest at 0000:03:00.1\n"
        );
        let verb = Verb::RemoveDevice {
            id: "card".into(),
            force: false,
            timeout: Some(90),
        };
        let body = json!({ "id": "card", "force": false, "wait": true, "timeout_s": 90 });
        assert_eq!(verb.body(), Some(body));
        assert_eq!(
            verb.limit_of(Path::new("")).unwrap(),
            END_LIMIT + Duration::from_secs(90)
        );
        let answer = json!({ "ids": ["card", "0000:01:00.1"] });
        assert_eq!(
            show(&verb, &answer, Screen::default()),
            "card and 0000:01:00.1: the host has them back\n"
        );
        let alone = show(&verb, &Value::Null, Screen::default());
        assert_eq!(alone, "card: the host has it back\n");
    }

    #[test]
    fn json_is_an_object_for_what_says_nothing_too() {
        assert_eq!(pretty(Value::Null), "{}\n");
        assert_eq!(pretty(json!({ "a": 1 })), "{\n  \"a\": 1\n}\n");
    }
}
