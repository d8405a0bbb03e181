//! What a VM is to be, as a process keeps it before the VM is put together and after its end.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::consoles::Terminals;
use super::handed::{Files, Handed, Unused};
use super::observed::State;
use super::pluggable::{no_room, to_plug};
use super::requests::{Info, RequestError};
use super::virtio::name_of;
use crate::config::{DeviceConfig, InvalidConfig, VirtioConfig, VmConfig};

/// The most devices that can be added to what a VM is to be: as many functions as a PCI bus has room for. What the
/// machine has room for is found when it is put together.
const DEVICES_MOST: usize = 256;

/// What a VM is to be, with the descriptors that were handed over for it.
#[derive(Clone, Debug, Default)]
pub(super) struct Definition {
    pub(super) config: VmConfig,
    /// Of virtio devices, by their names.
    pub(super) files: BTreeMap<String, Files>,
    /// Of host devices.
    pub(super) unused: Unused,
    /// An iommufd, which serves one VM after another.
    pub(super) iommufd: Files,
    pub(super) terminals: Arc<Terminals>,
}

impl Definition {
    pub(super) fn new(config: VmConfig, handed: Handed) -> Result<Self, RequestError> {
        let terminals = Terminals::open(&config).map_err(|error| RequestError::failed(&error))?;
        Ok(Self {
            config,
            files: handed.virtio,
            unused: handed.devices.into(),
            iommufd: handed.iommufd,
            terminals: Arc::new(terminals),
        })
    }

    /// How the VM is that is to be, or was.
    pub(super) fn info(&self, state: State) -> Info {
        let [serial, console] = self.terminals.paths();
        Info {
            serial,
            console,
            ..Info::of(&self.config, state)
        }
    }

    pub(super) fn add_devices(
        &mut self,
        configs: Vec<DeviceConfig>,
        files: Files,
    ) -> Result<(), RequestError> {
        let mut config = self.config.clone();
        let first = configs.first().map(DeviceConfig::id);
        for one in configs {
            let same = |other: &DeviceConfig| other.path == one.path || other.id() == one.id();
            if config.device.iter().any(same) || config.has_id(&one.id()) {
                return Err(RequestError::Exists(one.name()));
            }
            config.device.push(one);
        }
        self.replace(config)?;
        if let Some(name) = first.filter(|_| !files.is_empty()) {
            self.unused.keep(name, files);
        }
        Ok(())
    }

    pub(super) fn add_virtio(
        &mut self,
        device: VirtioConfig,
        files: Files,
    ) -> Result<(), RequestError> {
        let mut config = self.config.clone();
        let number = match &device {
            VirtioConfig::Disk(_) => config.disk.len(),
            VirtioConfig::Net(_) => config.net.len(),
            VirtioConfig::Fs(_) => config.fs.len(),
            VirtioConfig::Pmem(_) => config.pmem.len(),
            VirtioConfig::Generic(_) => config.generic.len(),
            VirtioConfig::Vsock(_) => 0,
        };
        let is_free = |name: &str| !config.has_id(name);
        let name = name_of(&device, number, is_free);
        if !is_free(&name) {
            return Err(RequestError::Exists(name));
        }
        // By its name its descriptors are found again.
        let device = match files.is_empty() {
            true => device,
            false => device.named(&name),
        };
        match device {
            VirtioConfig::Disk(disk) => config.disk.push(disk),
            VirtioConfig::Net(net) => config.net.push(net),
            VirtioConfig::Fs(fs) => config.fs.push(fs),
            VirtioConfig::Pmem(pmem) => config.pmem.push(pmem),
            VirtioConfig::Generic(generic) => config.generic.push(generic),
            VirtioConfig::Vsock(vsock) => match &config.vsock {
                None => config.vsock = Some(vsock),
                Some(_) => return Err(RequestError::Invalid(ONE_VSOCK.to_owned())),
            },
        }
        self.replace(config)?;
        if !files.is_empty() {
            self.files.insert(name, files);
        }
        Ok(())
    }

    fn replace(&mut self, config: VmConfig) -> Result<(), RequestError> {
        if count(&config) > DEVICES_MOST {
            let why = format!("a VM that is not booted yet takes {DEVICES_MOST} devices at most");
            return Err(RequestError::Invalid(why));
        }
        config.validate_parts().map_err(invalid)?;
        self.config = config;
        Ok(())
    }

    /// The guest begins with so many processors.
    pub(super) fn resize(&mut self, vcpus: u16) -> Result<(), RequestError> {
        let cpus = &mut self.config.cpus;
        let most = cpus.most();
        match u8::try_from(vcpus) {
            Ok(count) if (1..=most).contains(&count) => {
                cpus.boot = count;
                Ok(())
            }
            _ => Err(RequestError::Invalid(format!(
                "{vcpus} processors: the VM can have 1 to {most} of them (cpus.max_vcpus)"
            ))),
        }
    }

    /// The guest begins with so much RAM.
    pub(super) fn resize_memory(&mut self, bytes: u64) -> Result<(), RequestError> {
        let mut config = self.config.clone();
        if !config.memory_zone.is_empty() {
            return self.resize_beside_zones(bytes);
        }
        config.memory.size = bytes;
        // What came by ACPI in another life is among them.
        if !config.memory.comes_by_virtio() {
            config.memory.hotplugged_size = None;
        }
        self.replace(config)
    }

    /// The same where zones say what there is: what is more has been plugged from the start on.
    fn resize_beside_zones(&mut self, bytes: u64) -> Result<(), RequestError> {
        let mut config = self.config.clone();
        let size = config.memory.size;
        let Some(more) = bytes.checked_sub(size) else {
            return Err(RequestError::Invalid(format!(
                "{bytes} bytes of RAM are less than the {size} of the VM's memory zones, which stay"
            )));
        };
        if more > 0 && config.memory.pluggable().is_none() {
            return Err(no_room(config.pluggable().is_empty()));
        }
        config.memory.hotplugged_size = Some(more).filter(|more| *more > 0);
        self.replace(config)
    }

    /// The guest begins with so much RAM of a zone.
    pub(super) fn resize_zone(&mut self, id: &str, bytes: u64) -> Result<(), RequestError> {
        let more = to_plug(&self.config, id, bytes)?;
        let mut config = self.config.clone();
        let mut zones = config.memory_zone.iter_mut();
        if let Some(zone) = zones.find(|zone| zone.id == id) {
            zone.hotplugged_size = Some(more).filter(|more| *more > 0);
        }
        self.replace(config)
    }

    pub(super) fn remove(&mut self, id: &str) -> Result<(), RequestError> {
        let config = &mut self.config;
        let before = count(config);
        config.disk.retain(|disk| disk.id.as_deref() != Some(id));
        config.net.retain(|net| net.id.as_deref() != Some(id));
        config.fs.retain(|fs| fs.id.as_deref() != Some(id));
        config.pmem.retain(|pmem| pmem.id.as_deref() != Some(id));
        config.generic.retain(|one| one.id.as_deref() != Some(id));
        config
            .vsock
            .take_if(|vsock| vsock.id.as_deref() == Some(id));
        config.device.retain(|device| device.id() != id);
        self.files.remove(id);
        self.unused.take(id);
        match count(&self.config) == before {
            true => Err(RequestError::Unknown(id.to_owned())),
            false => Ok(()),
        }
    }

    /// Forgets the descriptors that were inherited by their numbers, for a VM has taken them over, and the numbers
    /// are by now anybody's. What they were of is opened by its name the next time.
    pub(super) fn forget_numbers(&mut self) {
        self.config.platform.iommufd_fd = None;
        for device in &mut self.config.device {
            device.fd = None;
        }
        for disk in &mut self.config.disk {
            disk.fd = None;
        }
        for net in &mut self.config.net {
            net.fd.clear();
        }
    }
}

/// Why a second one is refused. Linux, net/vmw_vsock/virtio_transport.c, `the_virtio_vsock`
pub(super) const ONE_VSOCK: &str =
    "a VM has one vsock device at most, for guests know one: remove the other";

/// The devices that can come and leave.
fn count(config: &VmConfig) -> usize {
    config.virtio().count() + config.device.len()
}

pub(super) fn invalid(error: InvalidConfig) -> RequestError {
    RequestError::Invalid(error.to_string())
}
