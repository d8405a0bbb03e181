//! `busway ctl`: the control socket of a VM that runs, for people.

mod added;
mod answer;
mod columns;
mod devices;
mod find;
mod info;
mod list;
#[cfg(test)]
mod tests;
mod top;

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use busway_iommu::printable;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::failure::Failure;
use super::findings;
use super::style::{Screen, write_out};
use crate::config::MAX_REMOVAL_TIMEOUT;
use crate::control::client::{self, ClientError};
use crate::exit::{HOST, RUNTIME};
use crate::preflight::CheckJson;
use added::{AddDiskArgs, AddFsArgs, AddGenericArgs, AddNetArgs, AddPmemArgs, PlaceArgs};
use answer::{number, text};
use columns::{Column, table};
use top::TopArgs;

/// The most bytes that are read of a file.
const MOST: u64 = 4 << 20;
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
#[derive(Subcommand, Clone, Debug, PartialEq)]
enum Verb {
    /// Show the VMs that run, found by their control sockets; needs no --api-socket
    List,
    /// Show what the VM is made of, and what it is doing
    Info,
    /// Show the VM's devices: where each is, how it is, how it interrupts, and what it has done
    Devices,
    /// Show what the VM does, live: exits, interrupts, faults, I/O and processor time
    ///
    /// On a terminal it goes on until q or Ctrl-C.
    Top(TopArgs),
    /// Show what disks and NICs have counted
    Counters,
    /// Print the VM's metrics in the OpenMetrics text format
    Metrics,
    /// Ask whether the VM answers
    Ping,
    /// Stop the guest between two instructions
    Pause,
    /// Let a guest that was paused go on
    Resume,
    /// Press the guest's power button: its system decides what follows
    PowerButton,
    /// Start the guest anew, as a reset of its own does
    Reboot,
    /// Give each of the guest's processors a non-maskable interrupt
    Nmi,
    /// End the VM and its process without asking its guest, as if the power were cut
    Shutdown,
    /// End the VM in the same way, and let its process be, where it is one of `busway --api-socket`
    Stop,
    /// Say what the VM of such a process is to be
    Create {
        /// A file with what `vm.create` takes, as JSON; - is standard input
        file: PathBuf,
    },
    /// Start the VM that it is said to be
    Boot,
    /// Forget what the VM is to be, and end it before where it runs
    Delete,
    /// Say whether the guest could have a host device, and what to do where it could not; adds nothing
    CheckDevice {
        /// As `busway device check` takes it
        device: String,
    },
    /// Add a host device, which VFIO has, in an empty slot; answered when it is there
    AddDevice {
        /// Its address (0000:01:00.0), a mediated device's UUID, or its folder in sysfs; several are functions of
        /// one device, and stay together
        #[arg(required = true, value_name = "DEVICE")]
        devices: Vec<String>,
        /// What it is called, or the first of several
        #[arg(long)]
        id: Option<String>,
        /// Behind a PCIe root port, or on bus 0 by itself; what `--platform root_ports=` said where nothing is given.
        /// Several functions are behind a port
        #[arg(long, value_name = "on|off", value_parser = switch)]
        root_port: Option<bool>,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Add a disk; answered when the guest can find it
    AddDisk(AddDiskArgs),
    /// Add a NIC; answered when the guest can find it
    AddNet(AddNetArgs),
    /// Add a shared folder, which virtiofsd serves; answered when the guest can find it
    AddFs(AddFsArgs),
    /// Add persistent memory, which is a file; answered when the guest can find it
    AddPmem(AddPmemArgs),
    /// Add a device of any kind, which another process serves (vhost-user); answered when the guest can find it
    AddVhostUser(AddGenericArgs),
    /// Add sockets between host and guest (vsock); answered when the guest can find them
    AddVsock {
        /// The guest's address, 3 or more; no other VM's of the host without --socket
        cid: u32,
        /// A Unix socket for programs on the host, in place of AF_VSOCK
        #[arg(long)]
        socket: Option<PathBuf>,
        /// What it is called
        #[arg(long)]
        id: Option<String>,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// Give the guest another number of processors, another amount of memory, or its balloon another size; answered when
    /// it has the processors, or is told
    Resize {
        /// How many processors, from 1 to what `--cpus max=` said
        #[arg(long, value_name = "N", required_unless_present_any = ["balloon", "memory"])]
        cpus: Option<u16>,
        /// How much RAM, from `--memory size=` to that and `hotplug_size=` together: by virtio-mem the guest takes it and
        /// gives it back as its driver can, by ACPI it gets no less than it has
        #[arg(long, value_name = "SIZE", value_parser = size)]
        memory: Option<u64>,
        /// What its balloon is to have: memory that it gives back to the host
        #[arg(long, value_name = "SIZE", value_parser = size)]
        balloon: Option<u64>,
    },
    /// Give the guest another amount of memory of one zone, which is a NUMA node's; answered when its driver is told
    ResizeZone {
        /// The zone's name, which `--memory-zone id=` said
        id: String,
        /// How much RAM of it, from `--memory-zone size=` to that and `hotplug_size=` together: the guest takes it and gives
        /// it back as its driver can
        #[arg(value_parser = size)]
        size: u64,
    },
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

/// At the end of the help.
pub(super) const EXIT_STATUS: &str = "\
Exit status: 0 it is done; 1 the VM refused, or did not answer in time (10 s; 2 minutes to end or
to add a device, and to remove one beside the time that the guest has for it); 2 bad usage, or no
VM's socket has this name; 3 check-device found something that stands against it.";

/// A switch, as `busway run` has them.
fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("say on or off".to_owned()),
    }
}

/// Bytes, as `busway run` has them.
fn size(text: &str) -> Result<u64, String> {
    let size = super::value::Value::Text(text.to_owned()).size();
    size.map_err(|why| why.to_string())
}

impl Verb {
    const fn method(&self) -> &'static str {
        match self {
            Self::Info | Self::Ping | Self::Devices | Self::Counters => "GET",
            _ => "PUT",
        }
    }

    const fn endpoint(&self) -> &'static str {
        match self {
            Self::Info => "vm.info",
            Self::Ping => "vmm.ping",
            Self::Devices => "vm.devices",
            Self::Counters => "vm.counters",
            Self::Reboot => "vm.reboot",
            Self::Nmi => "vm.nmi",
            Self::Stop => "vm.shutdown",
            Self::Create { .. } => "vm.create",
            Self::Boot => "vm.boot",
            Self::Delete => "vm.delete",
            Self::CheckDevice { .. } => "vm.check-device",
            // These have ways of their own.
            Self::List | Self::Top(_) | Self::Metrics => "",
            Self::Pause => "vm.pause",
            Self::Resume => "vm.resume",
            Self::PowerButton => "vm.power-button",
            Self::Shutdown => "vmm.shutdown",
            Self::AddDevice { .. } => "vm.add-device",
            Self::AddDisk(_) => "vm.add-disk",
            Self::AddNet(_) => "vm.add-net",
            Self::AddFs(_) => "vm.add-fs",
            Self::AddPmem(_) => "vm.add-pmem",
            Self::AddVhostUser(_) => "vm.add-generic-vhost-user",
            Self::AddVsock { .. } => "vm.add-vsock",
            Self::Resize { .. } => "vm.resize",
            Self::ResizeZone { .. } => "vm.resize-zone",
            Self::RemoveDevice { .. } => "vm.remove-device",
        }
    }

    /// Where the device is to be that is added.
    const fn place(&self) -> Option<PlaceArgs> {
        Some(match self {
            Self::AddDevice { place, .. } | Self::AddVsock { place, .. } => *place,
            Self::AddDisk(disk) => disk.place,
            Self::AddNet(net) => net.place,
            Self::AddFs(fs) => fs.place,
            Self::AddPmem(pmem) => pmem.place,
            Self::AddVhostUser(generic) => generic.place,
            _ => return None,
        })
    }

    /// What is said beside the endpoint.
    fn body(&self) -> Option<Value> {
        let mut body = self.asked()?;
        if let Some(place) = self.place() {
            place.say(&mut body);
        }
        Some(body)
    }

    fn asked(&self) -> Option<Value> {
        match self {
            Self::AddDevice {
                devices,
                id,
                root_port,
                ..
            } => {
                let (first, rest) = devices.split_first()?;
                let functions = rest.iter().map(|path| json!({ "path": path }));
                let functions: Vec<_> = functions.collect();
                let mut body = json!({ "path": first, "id": id, "functions": functions });
                if let Some(root_port) = root_port {
                    body["root_port"] = json!(root_port);
                }
                Some(body)
            }
            Self::AddFs(fs) => Some(json!({
                "tag": fs.tag, "socket": absolute(&fs.socket), "id": fs.id,
            })),
            Self::AddDisk(disk) => Some(disk.body()),
            Self::AddPmem(pmem) => Some(pmem.body()),
            Self::AddVhostUser(generic) => Some(generic.body()),
            Self::CheckDevice { device } => Some(json!({ "path": device })),
            Self::AddNet(net) => Some(net.body()),
            Self::AddVsock {
                cid, socket, id, ..
            } => Some(json!({
                "cid": cid, "socket": socket.as_deref().map(absolute), "id": id,
            })),
            Self::Resize {
                cpus,
                memory,
                balloon,
            } => Some(json!({
                "desired_vcpus": cpus, "desired_ram": memory, "desired_balloon": balloon, "wait": true,
            })),
            Self::ResizeZone { id, size } => Some(json!({ "id": id, "desired_ram": size })),
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
            | Self::Stop
            | Self::Boot
            | Self::Reboot
            | Self::Delete
            | Self::AddDevice { .. }
            | Self::AddDisk(_)
            | Self::AddNet(_)
            | Self::AddFs(_)
            | Self::AddPmem(_)
            | Self::AddVhostUser(_)
            | Self::AddVsock { .. }
            | Self::RemoveDevice { .. }
            | Self::Resize { .. } => END_LIMIT,
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
            Self::RemoveDevice { timeout: None, .. } | Self::Resize { .. } => {
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
    let (verb, screen) = (&args.verb, Screen::of_stdout());
    if *verb == Verb::List {
        return print(&list::show(Path::new("/proc"), args.json, screen));
    }
    let socket = args
        .api_socket
        .as_deref()
        .ok_or(
            "no socket: name the VM's with --api-socket PATH, as its `busway run` was given it; \
             `busway ctl list` shows those that there are",
        )
        .map_err(Failure::usage)?;
    let failed = |error: ClientError| Failure::new(error.exit_status(), error);
    match verb {
        Verb::Top(top) => return top::run(socket, top, args.json),
        Verb::Metrics => return print(&client::metrics(socket, LIMIT).map_err(failed)?),
        _ => {}
    }
    let body = match verb {
        Verb::Create { file } => Some(read(file).map_err(Failure::usage)?),
        verb => verb.body(),
    };
    let file = match verb {
        Verb::AddDisk(disk) => disk.file().map_err(Failure::usage)?,
        _ => None,
    };
    let answer = verb.limit_of(socket).and_then(|limit| {
        let (method, endpoint) = (verb.method(), verb.endpoint());
        client::ask_with(socket, method, endpoint, body.as_ref(), file, limit)
    });
    let answer = answer.map_err(failed)?;
    let refused = matches!(verb, Verb::CheckDevice { .. }) && answer["ready"] == false;
    print(&match args.json {
        true => pretty(answer),
        false => show(verb, &answer, screen),
    })?;
    match refused {
        // Why has been said.
        true => Err(Failure::silent(HOST)),
        false => Ok(()),
    }
}

fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    write_out(&mut out, text)
        .context("cannot write the result")
        .map_err(|error| Failure::explained(RUNTIME, error))
}

/// What a file says, as JSON. The VM takes no more than 4 MiB of it.
fn read(file: &Path) -> Result<Value, String> {
    let name = printable(&file.display().to_string());
    let mut text = Vec::new();
    let whole = match file.as_os_str() == "-" {
        true => io::stdin().lock().take(MOST).read_to_end(&mut text),
        false => fs::File::open(file).and_then(|file| file.take(MOST).read_to_end(&mut text)),
    };
    whole.map_err(|error| format!("{name}: {error}"))?;
    serde_json::from_slice(&text)
        .map_err(|error| format!("{name}: it is no JSON of what a VM is to be: {error}"))
}

/// Where there is nothing to say, an object without anything in it.
fn pretty(answer: Value) -> String {
    let answer = match answer {
        Value::Null => json!({}),
        answer => answer,
    };
    format!("{answer:#}\n")
}

/// What has come of a [`Verb::Resize`].
fn resized(cpus: Option<u16>, memory: Option<u64>, balloon: Option<u64>) -> String {
    let cpus = cpus.map(|cpus| format!("the guest has {cpus} processors\n"));
    let balloon = balloon.map(|bytes| format!("the guest's balloon is to have {bytes} bytes\n"));
    let memory = memory.map(|bytes| format!("the guest is to have {bytes} bytes of RAM\n"));
    [cpus, memory, balloon].into_iter().flatten().collect()
}

/// What a person reads of an answer.
fn show(verb: &Verb, answer: &Value, screen: Screen) -> String {
    match verb {
        Verb::Info => info::show(answer, screen),
        Verb::Devices => devices::show(answer, screen),
        Verb::Counters => counters(answer, screen),
        Verb::CheckDevice { device } => check(device, answer, screen),
        Verb::List | Verb::Top(_) | Verb::Metrics => String::new(),
        Verb::Resize {
            cpus,
            memory,
            balloon,
        } => resized(*cpus, *memory, *balloon),
        Verb::ResizeZone { id, size } => {
            let zone = printable(id);
            format!("the guest is to have {size} bytes of RAM of zone {zone}\n")
        }
        Verb::Reboot => "the guest starts anew\n".to_owned(),
        Verb::Nmi => "the guest's processors have their interrupt\n".to_owned(),
        Verb::Stop => "the VM has ended, and can be booted again\n".to_owned(),
        Verb::Create { .. } => "the VM can be booted\n".to_owned(),
        Verb::Boot => "the guest runs\n".to_owned(),
        Verb::Delete => "there is no VM any more\n".to_owned(),
        Verb::Ping => {
            let version = text(answer, "/version");
            let pid = number(answer, "/pid");
            format!("version {version} answers, as process {pid}\n")
        }
        Verb::Pause => "the guest is paused\n".to_owned(),
        Verb::Resume => "the guest runs\n".to_owned(),
        Verb::PowerButton => "the power button is pressed\n".to_owned(),
        Verb::Shutdown => "the VM has ended\n".to_owned(),
        Verb::AddDevice { .. }
        | Verb::AddDisk(_)
        | Verb::AddNet(_)
        | Verb::AddFs(_)
        | Verb::AddPmem(_)
        | Verb::AddVhostUser(_)
        | Verb::AddVsock { .. } => {
            let all = std::iter::once(answer).chain(answer::list(answer, "/functions"));
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
            let ids: Vec<_> = answer::list(answer, "/ids")
                .iter()
                .map(|id| text(id, ""))
                .collect();
            match ids.is_empty() {
                true => format!("{}: the host has it back\n", printable(id)),
                false => format!("{}: the host has them back\n", ids.join(" and ")),
            }
        }
    }
}

/// What devices have counted, by device and name.
fn counters(answer: &Value, screen: Screen) -> String {
    const COLUMNS: [Column; 3] = [
        Column::words("DEVICE").cut_to(12),
        Column::words("COUNTER"),
        Column::number("COUNT"),
    ];
    let devices = answer.as_object().into_iter().flatten();
    let rows: Vec<_> = devices
        .flat_map(|(device, counters)| {
            let counters = counters.as_object().into_iter().flatten();
            counters.map(move |(name, count)| {
                let count = count.as_u64().unwrap_or_default().to_string();
                vec![
                    printable(device).into(),
                    printable(name).into(),
                    count.into(),
                ]
            })
        })
        .collect();
    match rows.is_empty() {
        true => "no device of the VM's counts\n".to_owned(),
        false => table(&COLUMNS, &rows, screen),
    }
}

/// What `busway device check` says, as far as the VM knows it.
fn check(device: &str, answer: &Value, screen: Screen) -> String {
    let Ok(found) = serde_json::from_value::<CheckJson<'_>>(answer.clone()) else {
        return format!("{}: the answer is of another form\n", printable(device));
    };
    let devices = found.devices.iter().map(|one| {
        let verdict = findings::verdict(one.ready, one.needs_only_binding);
        (&one.address, verdict, &one.findings)
    });
    let mediated = found.mediated_devices.iter().map(|one| {
        let verdict = findings::verdict(one.ready, false);
        (&one.uuid, verdict, &one.findings)
    });
    let mut text = String::new();
    for (name, verdict, findings) in devices.chain(mediated) {
        text += &findings::heading(&printable(name), verdict, screen);
        text += &findings::show_json(findings, screen);
        text.push('\n');
    }
    text += &findings::heading("This host", findings::host_verdict(&found.host), screen);
    text += &findings::show_json(&found.host, screen);
    text
}
