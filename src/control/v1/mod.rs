//! What each request of the API means: Cloud Hypervisor's v1, below `/api/v1/`.
//!
//! One table has all of its endpoints. What Busway cannot do yet is answered with 501 and the name of what
//! it is, so that a client learns what is missing and not merely that something is.

mod added;
mod beside;
mod config;
mod create;
mod device;
mod generic;
mod info;
mod lacking;
mod looks;
mod numa;
mod observe;
mod pmem;
mod resize;
mod virtio;

use std::sync::Arc;
use std::time::Duration;

use busway_host::SysRoot;
use serde::{Deserialize, Serialize};

use super::End;
use super::connections::Service;
use super::http::{Answer, JSON, Request as HttpRequest};
use super::{json, metrics};
use crate::config::{MAX_REMOVAL_TIMEOUT, VirtioConfig, is_removal_timeout};
use crate::machine::{self, Control, Extent, Files, Request, RequestError};
use added::PciDeviceInfo;
use create::CreateVm;
use device::AddDevice;
use generic::AddGeneric;
use lacking::{Fault, Lack};
use observe::{Activity, Devices};
use pmem::AddPmem;
use resize::{Resize, ResizeZone};
use virtio::{AddDisk, AddFs, AddNet, AddVsock};

/// Where the API is.
pub(super) const PREFIX: &str = "/api/v1/";

/// The root cause of a refusal that clients look for when the guest does not run any more.
const NOT_RUNNING: &str = "VM is not running";

/// One endpoint.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) name: &'static str,
    pub(super) method: &'static str,
    pub(super) body: Body,
    act: Act,
}

/// What comes with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// Nothing: anything else is a mistake.
    Forbidden,
    /// Nothing that is looked at.
    Ignored,
    /// JSON.
    Wanted,
}

/// What is done.
#[derive(Debug)]
enum Act {
    Ping,
    Info,
    Counters,
    Devices,
    Activity,
    /// It is looked whether the guest could have a host device.
    CheckDevice,
    /// The machine is asked; and what is said where it refuses.
    Ask(Request, &'static str),
    /// A host device comes, or goes.
    AddDevice,
    RemoveDevice,
    /// The guest has more or less of something.
    Resize,
    /// The guest has more or less of a memory zone.
    ResizeZone,
    /// A virtio device comes: what it is follows from the body.
    AddVirtio(
        fn(&[u8], &Files) -> Result<VirtioConfig, Fault>,
        &'static str,
    ),
    /// It is said what the VM is to be.
    Create,
    /// So much ends: with 204, or with 200 and an empty body.
    End(Extent, u16),
    /// Nothing yet; what it would be.
    NotYet(Lack),
}

const fn get(name: &'static str, act: Act) -> Endpoint {
    Endpoint {
        name,
        method: "GET",
        body: Body::Forbidden,
        act,
    }
}

const fn put(name: &'static str, act: Act) -> Endpoint {
    Endpoint {
        name,
        method: "PUT",
        body: Body::Forbidden,
        act,
    }
}

const fn with_body(name: &'static str, act: Act) -> Endpoint {
    Endpoint {
        name,
        method: "PUT",
        body: Body::Wanted,
        act,
    }
}

/// What is still to come, with a body.
const fn later(name: &'static str, what: Lack) -> Endpoint {
    with_body(name, Act::NotYet(what))
}

/// All endpoints.
pub(super) static ENDPOINTS: &[Endpoint] = &[
    get("vmm.ping", Act::Ping),
    get("vm.info", Act::Info),
    get("vm.counters", Act::Counters),
    get("vm.devices", Act::Devices),
    get("vm.activity", Act::Activity),
    put(
        "vm.pause",
        Act::Ask(Request::Pause, "The VM could not be paused"),
    ),
    put(
        "vm.resume",
        Act::Ask(Request::Resume, "The VM could not be resumed"),
    ),
    put(
        "vm.power-button",
        Act::Ask(
            Request::PowerButton,
            "The power button could not be pressed",
        ),
    ),
    put(
        "vm.nmi",
        Act::Ask(
            Request::Nmi,
            "The non-maskable interrupt could not be sent to the VM",
        ),
    ),
    with_body("vm.create", Act::Create),
    put("vm.boot", Act::Ask(Request::Boot, "The VM could not boot")),
    put(
        "vm.reboot",
        Act::Ask(Request::Reboot, "The VM could not reboot"),
    ),
    put("vm.shutdown", Act::End(Extent::Vm, 204)),
    put("vm.delete", Act::End(Extent::Definition, 204)),
    Endpoint {
        name: "vmm.shutdown",
        method: "PUT",
        body: Body::Ignored,
        act: Act::End(Extent::Process, 200),
    },
    with_body("vm.resize", Act::Resize),
    later("vm.resize-disk", Lack::ResizeDisk),
    with_body("vm.resize-zone", Act::ResizeZone),
    with_body("vm.add-device", Act::AddDevice),
    with_body("vm.check-device", Act::CheckDevice),
    later("vm.add-user-device", Lack::UserDevices),
    with_body(
        "vm.add-disk",
        Act::AddVirtio(
            |body, files| json::parse::<AddDisk>(body)?.into_config(files),
            "The disk could not be added to the VM",
        ),
    ),
    with_body(
        "vm.add-fs",
        Act::AddVirtio(
            |body, files| json::parse::<AddFs>(body)?.into_config(files),
            "The shared folder could not be added to the VM",
        ),
    ),
    with_body(
        "vm.add-generic-vhost-user",
        Act::AddVirtio(
            |body, files| json::parse::<AddGeneric>(body)?.into_config(files),
            "The vhost-user device could not be added to the VM",
        ),
    ),
    with_body(
        "vm.add-pmem",
        Act::AddVirtio(
            |body, files| json::parse::<AddPmem>(body)?.into_config(files),
            "The persistent memory could not be added to the VM",
        ),
    ),
    with_body(
        "vm.add-net",
        Act::AddVirtio(
            |body, files| json::parse::<AddNet>(body)?.into_config(files),
            "The NIC could not be added to the VM",
        ),
    ),
    with_body(
        "vm.add-vsock",
        Act::AddVirtio(
            |body, files| json::parse::<AddVsock>(body)?.into_config(files),
            "The vsock device could not be added to the VM",
        ),
    ),
    later("vm.add-vdpa", Lack::Vdpa),
    with_body("vm.remove-device", Act::RemoveDevice),
    later("vm.coredump", Lack::CoreDump),
    later("vm.snapshot", Lack::Snapshot),
    later("vm.restore", Lack::Restore),
    later("vm.receive-migration", Lack::Migration),
    later("vm.send-migration", Lack::Migration),
];

#[cfg(any(test, feature = "hostile"))]
impl Endpoint {
    /// The statuses that it can answer with.
    pub(super) fn statuses(&self) -> &'static [u16] {
        match self.act {
            Act::Ping => &[200, 400],
            Act::Info | Act::Counters | Act::Devices | Act::Activity => &[200, 400, 404, 429, 500],
            Act::CheckDevice => &[200, 400, 404, 429, 500],
            Act::Ask(Request::Boot, _) => &[204, 400, 404, 429, 500],
            Act::Create => &[204, 400, 429, 500, 501],
            Act::Ask(..) | Act::End(_, 204) => &[204, 400, 429, 500],
            Act::End(..) => &[200, 400, 429, 500],
            Act::AddDevice | Act::AddVirtio(..) => &[200, 204, 400, 404, 409, 429, 500, 501],
            Act::RemoveDevice => &[200, 204, 400, 404, 429, 500],
            Act::Resize | Act::ResizeZone => &[204, 400, 404, 429, 500],
            Act::NotYet(_) => &[400, 501],
        }
    }
}

/// The API of one process.
#[derive(Debug)]
pub(super) struct Api {
    control: Control,
    end: Arc<End>,
    /// The host whose devices are checked.
    host: SysRoot,
}

/// What leaves together.
#[derive(Serialize)]
struct Removed {
    ids: Vec<String>,
}

/// A text that says something: some clients write an empty one for none.
fn some_text(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

/// `VmRemoveDevice`
#[derive(Deserialize)]
struct RemoveDevice {
    id: String,
    /// Beside Cloud Hypervisor's: pull it out where the guest does not release it.
    #[serde(default)]
    force: bool,
    /// Beside Cloud Hypervisor's: the seconds that the guest has to release it.
    timeout_s: Option<u32>,
    /// Beside Cloud Hypervisor's: answer when it is known what became of it. Its clients are answered when the guest
    /// has been asked, for theirs are given a second or five, and they take the device for gone.
    #[serde(default)]
    wait: bool,
}

impl RemoveDevice {
    fn into_request(self) -> Result<Request, String> {
        let limit = match self.timeout_s {
            Some(seconds) if !is_removal_timeout(seconds) => {
                return Err(format!(
                    "timeout_s={seconds}: a guest has 1 to {MAX_REMOVAL_TIMEOUT} seconds to release a device"
                ));
            }
            seconds => seconds.map(|seconds| Duration::from_secs(seconds.into())),
        };
        Ok(Request::RemoveDevice {
            id: self.id,
            force: self.force,
            limit,
            wait: self.wait,
        })
    }
}

/// `VmmPingResponse`
#[derive(Serialize)]
struct Ping {
    build_version: &'static str,
    version: &'static str,
    pid: u32,
    features: [&'static str; 1],
}

impl Service for Api {
    fn answer(&self, request: &HttpRequest) -> Answer {
        if request.path == metrics::PATH {
            return self.metrics(request);
        }
        let endpoint = match find(&request.path) {
            Some(endpoint) => endpoint,
            None => return failed(404, &[&format!("{} is no path of this API", request.path)]),
        };
        let Endpoint {
            name, method, body, ..
        } = endpoint;
        if request.method != *method {
            let text = format!("{name} is asked for by {method}, not by {}", request.method);
            return failed(400, &[&text]);
        }
        if *body == Body::Forbidden && !request.body.trim_ascii().is_empty() {
            return failed(400, &[&format!("{name} takes no body")]);
        }
        self.act(endpoint, request)
    }

    fn refuse(&self, status: u16, reason: &str) -> Answer {
        failed(status, &[reason])
    }
}

fn find(path: &str) -> Option<&'static Endpoint> {
    let name = path.strip_prefix(PREFIX)?;
    ENDPOINTS.iter().find(|endpoint| endpoint.name == name)
}

impl Api {
    pub(super) fn new(control: Control, end: Arc<End>) -> Self {
        Self {
            control,
            end,
            host: SysRoot::default(),
        }
    }

    /// The same on another host.
    #[cfg(test)]
    pub(super) fn on(self, host: SysRoot) -> Self {
        Self { host, ..self }
    }

    fn act(&self, endpoint: &Endpoint, request: &HttpRequest) -> Answer {
        let HttpRequest { body, files, .. } = request;
        match &endpoint.act {
            Act::Ping => succeeded(&Ping {
                build_version: concat!("busway ", env!("CARGO_PKG_VERSION")),
                version: env!("CARGO_PKG_VERSION"),
                pid: crate::sandbox::process_id(),
                features: ["kvm"],
            }),
            Act::Info => self.info(),
            Act::Counters => self.counters(),
            Act::Devices => self.observe("The VM's devices cannot be shown", |seen| {
                succeeded(&Devices::of(seen))
            }),
            Act::Activity => self.observe("The VM's activity cannot be shown", |seen| {
                succeeded(&Activity::of(seen))
            }),
            Act::CheckDevice => self.check_device(body),
            Act::Ask(request, what) => match self.control.ask(request.clone()) {
                Ok(_) => done(),
                Err(error) => refused(what, &error),
            },
            Act::Create => self.create(body, files),
            Act::Resize => self.resize(body),
            Act::ResizeZone => self.resize_zone(body),
            Act::AddDevice => self.add_device(body, files),
            Act::AddVirtio(read, what) => match read(body, files) {
                Ok(config) => self.add(Request::AddVirtio(Box::new(config), files.clone()), what),
                Err(fault) => fault.answer(what),
            },
            Act::RemoveDevice => self.remove_device(body),
            Act::End(extent, status) => self.end(*extent, *status),
            Act::NotYet(lack) => Fault::Lacks(*lack).answer(endpoint.name),
        }
    }

    /// Answers when it is known what the VM is to be.
    fn create(&self, body: &[u8], files: &Files) -> Answer {
        const WHAT: &str = "The VM could not be created";
        let created = read::<CreateVm>(body).and_then(|create| create.into_config(files));
        let (config, handed) = match created {
            Ok(created) => created,
            Err(fault) => return fault.answer(WHAT),
        };
        match self.control.ask(Request::Create(Box::new(config), handed)) {
            Ok(_) => done(),
            Err(error) => refused(WHAT, &error),
        }
    }

    /// Answers when the device, or its functions together, are in a slot of the guest's.
    fn add_device(&self, body: &[u8], files: &Files) -> Answer {
        const WHAT: &str = "The device could not be added to the VM";
        match read::<AddDevice>(body).and_then(|device| device.into_configs(files)) {
            Ok(configs) => self.add(Request::AddDevice(configs, files.clone()), WHAT),
            Err(fault) => fault.answer(WHAT),
        }
    }

    fn add(&self, request: Request, what: &str) -> Answer {
        match self.control.ask(request) {
            Ok(machine::Answer::Added(added)) => succeeded(&PciDeviceInfo::from(added)),
            // It will be there when the VM is booted.
            Ok(_) => done(),
            Err(error) => refused(what, &error),
        }
    }

    /// Answers when the guest has been asked, or when the host has the device back, and all that was in its slot.
    fn remove_device(&self, body: &[u8]) -> Answer {
        const WHAT: &str = "The device could not be removed from the VM";
        let asked = json::parse::<RemoveDevice>(body).and_then(RemoveDevice::into_request);
        let request = match asked {
            Ok(request) => request,
            Err(why) => return failed(400, &[WHAT, &why]),
        };
        match self.control.ask(request) {
            Ok(machine::Answer::RemovedTogether(ids)) => succeeded(&Removed { ids }),
            Ok(_) => done(),
            Err(error) => refused(WHAT, &error),
        }
    }

    /// Answers when the guest has been asked, or when it is known what it made of it.
    fn resize(&self, body: &[u8]) -> Answer {
        const WHAT: &str = "The VM could not be resized";
        let asked = match read::<Resize>(body) {
            Ok(asked) => asked,
            Err(fault) => return fault.answer(WHAT),
        };
        for request in asked.into_requests().into_iter().flatten() {
            if let Err(error) = self.control.ask(request) {
                return refused(WHAT, &error);
            }
        }
        done()
    }

    /// Answers when the guest has been asked.
    fn resize_zone(&self, body: &[u8]) -> Answer {
        const WHAT: &str = "The memory zone could not be resized";
        let asked = match read::<ResizeZone>(body) {
            Ok(asked) => asked,
            Err(fault) => return fault.answer(WHAT),
        };
        match self.control.ask(asked.into()) {
            Ok(_) => done(),
            Err(error) => refused(WHAT, &error),
        }
    }

    /// Answers when that has ended and given back all it had, for clients kill the process when they are
    /// answered.
    fn end(&self, extent: Extent, status: u16) -> Answer {
        match self.control.ask(Request::End(extent)) {
            Ok(_) => {}
            // The process ends with it.
            Err(RequestError::Ended) => self.end.wait(),
            Err(error) => return refused("The VM could not be shut down", &error),
        }
        Answer {
            status,
            body: (status != 204).then(Vec::new),
            content_type: JSON,
        }
    }
}

/// What is said in a body.
fn read<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    Ok(json::parse(body)?)
}

fn done() -> Answer {
    Answer {
        status: 204,
        body: None,
        content_type: JSON,
    }
}

fn succeeded<T: Serialize>(value: &T) -> Answer {
    match json::ascii(value) {
        Ok(body) => Answer {
            status: 200,
            body: Some(body),
            content_type: JSON,
        },
        Err(error) => failed(500, &["The answer cannot be written", &error.to_string()]),
    }
}

/// What a machine refused, from what failed to its root cause.
fn refused(what: &str, error: &RequestError) -> Answer {
    let said = error.to_string();
    match error {
        RequestError::State(_)
        | RequestError::AlreadyCreated
        | RequestError::NotRunning
        | RequestError::Failed(_) => failed(500, &[what, &said]),
        RequestError::Invalid(_) => failed(400, &[what, &said]),
        RequestError::NotCreated => failed(404, &[what, &said]),
        RequestError::Ended => failed(500, &[what, &said, NOT_RUNNING]),
        RequestError::TooMany | RequestError::Resizing | RequestError::Growing => {
            failed(429, &[what, &said])
        }
        RequestError::Exists(_) => failed(409, &[what, &said]),
        RequestError::Unknown(_) | RequestError::NoZone(_) => failed(404, &[what, &said]),
    }
}

/// An error, from the outermost message to the root cause.
fn failed(status: u16, messages: &[&str]) -> Answer {
    Answer {
        status,
        // A list of texts can be written.
        body: Some(json::ascii(&messages).unwrap_or_default()),
        content_type: JSON,
    }
}
