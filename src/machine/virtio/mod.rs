//! The virtio devices that a guest can be given and that can be taken from it, at its start and while it
//! runs, by the same steps: made for the host's file or interface, made a function, put into a slot of bus 0.
//!
//! A guest is told of them by ACPI (`devices::pci_hotplug`). It gives the function's BARs addresses itself, as
//! an operating system does for whatever comes to a board; that there is room for them is found out before.
//!
//! A guest that does not release a device keeps its function, for its driver would wait for ever at one that
//! is gone. Where the device is taken from it all the same, it is the function's end on the host that goes, and
//! the function goes when the guest releases it or starts anew.

mod leave;
mod memory;
#[cfg(test)]
mod place_tests;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use busway_pci::{Function, InterruptRoutes, RootSlot};

use super::RunError;
use super::aside::Aside;
use super::definition::ONE_VSOCK;
use super::events::Events;
use super::handed::Files;
use super::observed::{DeviceSeen, DeviceState, Doing, VirtioDoing};
use super::pci::Pci;
use super::removal::Closing;
use super::requests::{Added, Answer, Asker, RequestError, VirtioInfo};
use super::seats::{Owner, Seat, Seats};
use crate::config::{BalloonConfig, DiskConfig, PciPlace, VirtioConfig, VmConfig};
use crate::kvm::Cores;
use crate::memory::{Ballooned, Discards, GuestRam, Slots};
use crate::virtio::balloon::{Balloon, BalloonTarget};
use crate::virtio::blk::Blk;
use crate::virtio::net::Net;
use crate::virtio::pmem::Pmem;
use crate::virtio::vhost_user::{self, VhostUser};
use crate::virtio::{MemoryTable, ServedBy, Sight, VirtioDevice, VirtioPci, vsock};
use leave::Leaving;
pub(super) use memory::ComingMemory;
use memory::MEMORY;

/// The devices of a machine.
#[derive(Debug)]
pub(super) struct VirtioDevices {
    entries: Vec<Entry>,
    /// Those that stay, by their names, with their addresses.
    fixed: Vec<(String, String, Sight)>,
    /// Those on their way. They are waited for.
    builds: Aside,
    coming: Vec<Coming>,
    come: Arc<Mutex<Vec<Come>>>,
    /// The closing of devices that leave.
    releases: Aside,
    /// Their names, where somebody takes them for gone.
    closing: Closing<String>,
    seats: Arc<Seats>,
    maker: Maker,
    events: Arc<Events>,
    balloon: Option<BalloonTarget>,
    memory: Vec<ComingMemory>,
    /// How many PCI segments the machine has.
    segments: u16,
}

/// A device that the guest has.
#[derive(Debug)]
struct Entry {
    name: String,
    config: VirtioConfig,
    /// What was handed over for it.
    files: Files,
    slot: RootSlot,
    function: Weak<VirtioPci>,
    sight: Sight,
    /// Somebody wants it removed.
    leaving: Option<Leaving>,
    /// Its end on the host is gone, and with it its name; only its function is left.
    retired: bool,
}

/// A device that is being made.
#[derive(Debug)]
struct Coming {
    name: String,
    config: VirtioConfig,
    files: Files,
    slot: RootSlot,
}

/// A device that was made for a slot, or why it was not.
#[derive(Debug)]
struct Come {
    slot: RootSlot,
    outcome: Result<Made, RunError>,
    asker: Asker,
}

/// A function, and its configuration with the name of the tap that it has.
type Made = (VirtioConfig, Arc<VirtioPci>);

/// What makes a function of a configuration.
#[derive(Clone, Debug)]
struct Maker {
    ram: GuestRam,
    /// The same for back ends, which are told where it is.
    memory: Arc<MemoryTable>,
    /// Where files become memory.
    slots: Slots,
    routes: Arc<dyn InterruptRoutes>,
}

impl Maker {
    /// Takes from the host what the device needs, unless its descriptor was passed.
    fn make(&self, name: &str, config: &VirtioConfig, files: &Files) -> Result<Made, RunError> {
        let mut config = config.clone();
        let device: Box<dyn VirtioDevice> = match &mut config {
            VirtioConfig::Disk(disk) if disk.vhost_user => {
                Box::new(VhostUser::disk(name, disk, &self.ram, &self.memory)?)
            }
            VirtioConfig::Fs(fs) => Box::new(VhostUser::fs(name, fs, &self.ram, &self.memory)?),
            VirtioConfig::Generic(generic) => {
                Box::new(VhostUser::generic(name, generic, &self.ram, &self.memory)?)
            }
            VirtioConfig::Pmem(pmem) => Box::new(Pmem::new(name, pmem, &self.slots)?),
            VirtioConfig::Disk(disk) => {
                // By its number while it is opened, which makes another descriptor of it.
                let mut there = disk.clone();
                if let Some(file) = files.all().first() {
                    there.fd = u32::try_from(file.as_raw_fd()).ok();
                }
                Box::new(Blk::new(name, &there)?)
            }
            VirtioConfig::Net(net) if net.vhost_user => {
                Box::new(VhostUser::net(name, net, &self.ram, &self.memory)?)
            }
            VirtioConfig::Net(asked) => {
                let mut net = Net::new(name, asked, files.all())?;
                net.serve_in_kernel(asked.vhost, &self.ram, &self.memory)?;
                let by = match net.served_by() {
                    ServedBy::Busway => "Busway",
                    ServedBy::Kernel => "the host's kernel",
                    ServedBy::BackEnd => "another process",
                };
                log::info!("net {name}: tap {}, served by {by}", net.tap_name());
                asked.tap = Some(net.tap_name().to_owned());
                Box::new(net)
            }
            VirtioConfig::Vsock(asked) => vsock::open(name, asked, &self.ram, &self.memory)?,
        };
        Ok((config, self.function(device)?))
    }

    fn function(&self, device: Box<dyn VirtioDevice>) -> Result<Arc<VirtioPci>, RunError> {
        Ok(VirtioPci::new(
            device,
            self.ram.clone(),
            self.routes.clone(),
        )?)
    }
}

impl VirtioDevices {
    /// Of a machine that has none yet.
    pub(super) fn new(
        ram: &GuestRam,
        memory: &Arc<MemoryTable>,
        slots: Slots,
        routes: Arc<dyn InterruptRoutes>,
        seats: &Arc<Seats>,
        events: &Arc<Events>,
    ) -> Self {
        Self {
            entries: Vec::new(),
            fixed: Vec::new(),
            builds: Aside::default(),
            coming: Vec::new(),
            come: Arc::default(),
            releases: Aside::default(),
            closing: Closing::default(),
            seats: seats.clone(),
            maker: Maker {
                ram: ram.clone(),
                memory: memory.clone(),
                slots,
                routes,
            },
            events: events.clone(),
            balloon: None,
            memory: Vec::new(),
            segments: 1,
        }
    }

    /// Puts those that the machine starts with into the first slots, for the `files` that were handed over by
    /// their names.
    ///
    /// # Errors
    /// [`RunError`]
    pub(super) fn add_first(
        &mut self,
        config: &VmConfig,
        files: &BTreeMap<String, Files>,
        pci: &mut Pci,
    ) -> Result<(), RunError> {
        self.segments = config.platform.segments();
        let given: Vec<_> = config
            .virtio()
            .filter_map(|(_, device)| device.id().map(str::to_owned))
            .chain(config.device.iter().filter_map(|device| device.id.clone()))
            .collect();
        for (index, device) in config.virtio() {
            let free = |name: &str| !given.iter().any(|given| given == name) && !self.has(name);
            let name = name_of(&device, index, free);
            let files = files.get(&name).cloned().unwrap_or_default();
            let (device, function) = self.maker.make(&name, &device, &files)?;
            let (slot, id) = pci.add_virtio(&function, device.place())?;
            self.enter(name, device, files, slot, &function);
            self.seats.take(slot, Owner::Virtio, id);
        }
        Ok(())
    }

    /// The disks that the guest has, by name.
    pub(super) fn disks(&self) -> impl Iterator<Item = (&str, &DiskConfig)> {
        self.entries.iter().filter_map(|entry| match &entry.config {
            VirtioConfig::Disk(disk) => Some((entry.name.as_str(), disk)),
            _ => None,
        })
    }

    /// Adds a device that stays: what else the board has.
    ///
    /// # Errors
    /// [`RunError`]
    pub(super) fn add_fixed(
        &mut self,
        device: Box<dyn VirtioDevice>,
        pci: &mut Pci,
    ) -> Result<(), RunError> {
        let function = self.maker.function(device)?;
        let (slot, _) = pci.add_virtio(&function, PciPlace::default())?;
        let name = function.name().to_owned();
        self.fixed.push((name, address(slot), function.sight()));
        Ok(())
    }

    /// Adds the balloon, whose pages go by `discards`, and by `ballooned` beside devices.
    ///
    /// # Errors
    /// [`RunError`]
    pub(super) fn add_balloon(
        &mut self,
        config: &BalloonConfig,
        discards: &Arc<Discards>,
        ballooned: Option<Ballooned>,
        pci: &mut Pci,
    ) -> Result<(), RunError> {
        let keeps = ballooned.is_none();
        let balloon = Balloon::new("balloon", config, discards, ballooned)?;
        self.balloon = Some(balloon.target());
        if keeps && discards.is_inhibited() {
            log::warn!(
                "balloon: what the guest gives back stays with the VM, for assigned devices reach all of RAM by DMA \
                 (--balloon vfio=remap has them reach less)"
            );
        }
        self.add_fixed(Box::new(balloon), pci)
    }

    /// How large the balloon is to be, where there is one.
    pub(super) fn balloon(&self) -> Option<&BalloonTarget> {
        self.balloon.as_ref()
    }

    /// Whether one has this name, or is to have it.
    pub(super) fn has(&self, name: &str) -> bool {
        let there = self.entries.iter().filter(|entry| !entry.retired);
        let coming = self.coming.iter().map(|one| &one.name);
        there
            .map(|entry| &entry.name)
            .chain(coming)
            .any(|other| other == name)
    }

    /// Those that the guest has, for who asks.
    pub(super) fn info(&self) -> Vec<VirtioInfo> {
        let there = self.entries.iter().filter(|entry| !entry.retired);
        there
            .map(|entry| VirtioInfo {
                id: entry.name.clone(),
                address: address(entry.slot),
                config: entry.config.clone(),
            })
            .collect()
    }

    /// What is seen of those that the guest has, or is to have.
    pub(super) fn observed(&self) -> Vec<DeviceSeen> {
        let there = self.entries.iter().map(|entry| DeviceSeen {
            state: match entry.leaving.is_some() || entry.retired {
                true => DeviceState::Going,
                false => DeviceState::Present,
            },
            ..observed(
                entry.name.clone(),
                entry.config.word(),
                address(entry.slot),
                &entry.sight,
            )
        });
        let coming = self.coming.iter().map(|one| DeviceSeen {
            id: one.name.clone(),
            kind: one.config.word(),
            host: None,
            guest: None,
            state: DeviceState::Coming,
            doing: None,
        });
        // No disk or NIC is called so unless somebody wants it to be.
        let fixed = self.fixed.iter().map(|(name, address, sight)| {
            let kind = match name.as_str() {
                "console" => "console",
                "balloon" => "balloon",
                name if name.starts_with(MEMORY) => "memory",
                _ => "rng",
            };
            observed(format!("__{name}"), kind, address.clone(), sight)
        });
        there.chain(coming).chain(fixed).collect()
    }

    /// The same as configurations, each with the name that it has, without those that somebody takes for gone.
    pub(super) fn configs(&self) -> impl Iterator<Item = VirtioConfig> {
        let stays = |entry: &&Entry| !entry.retired && !Self::is_told_gone(entry);
        let there = self.entries.iter().filter(stays);
        there.map(|entry| entry.config.clone().named(&entry.name))
    }

    /// The descriptors that were handed over for those that the guest has, by their names.
    pub(super) fn files(&self) -> BTreeMap<String, Files> {
        let stays = |entry: &&Entry| !entry.files.is_empty() && !Self::is_told_gone(entry);
        let there = self.entries.iter().filter(stays);
        there
            .map(|entry| (entry.name.clone(), entry.files.clone()))
            .collect()
    }

    /// Adds a device to the machine that runs. Whoever asks is answered when the guest can find it, or when
    /// it is known that it will not. `cores`: what its threads are on, the kernel's among them. `taken`: whether a name is
    /// another device's.
    pub(super) fn add(
        &mut self,
        config: VirtioConfig,
        files: Files,
        cores: &Cores,
        taken: impl Fn(&str) -> bool,
        asker: Asker,
    ) {
        let (name, slot) = match self.find_place(&config, taken) {
            Ok(place) => place,
            Err(error) => return asker.answer(Err(error)),
        };
        self.coming.push(Coming {
            name: name.clone(),
            config: config.clone(),
            files: files.clone(),
            slot,
        });
        let (maker, come, events) = (self.maker.clone(), self.come.clone(), self.events.clone());
        let (described, cores) = (config.described(&name), cores.clone());
        self.builds.start("attach", &described, move || {
            if let Err(error) = cores.enter() {
                log::warn!("{name}: its threads are kept from the vCPUs' cores: {error}");
            }
            let outcome = maker.make(&name, &config, &files);
            let mut come = come.lock().unwrap_or_else(PoisonError::into_inner);
            come.push(Come {
                slot,
                outcome,
                asker,
            });
            drop(come);
            events.attached();
        });
    }

    /// The name and the slot for a device that is to come.
    fn find_place(
        &self,
        config: &VirtioConfig,
        taken: impl Fn(&str) -> bool,
    ) -> Result<(String, RootSlot), RequestError> {
        config.check().map_err(|error| {
            let word = config.word();
            RequestError::Failed(format!("{word}: {error}"))
        })?;
        let is_free = |name: &str| !self.has(name) && !taken(name);
        let name = name_of(config, 0, is_free);
        if !is_free(&name) {
            return Err(RequestError::Exists(name));
        }
        if config.socket().is_some()
            && let Some(why) = vhost_user::private_memory(&self.maker.ram)
        {
            let described = config.described(&name);
            return Err(RequestError::Invalid(format!("{described}: {why}")));
        }
        let there = self.entries.iter().filter(|entry| !entry.retired);
        let there = there.map(|entry| (&entry.name, &entry.config));
        let coming = self.coming.iter().map(|one| (&one.name, &one.config));
        let is_vsock = |config: &VirtioConfig| matches!(config, VirtioConfig::Vsock(_));
        let mut others = there.clone().chain(coming.clone());
        if is_vsock(config) && others.any(|(_, other)| is_vsock(other)) {
            return Err(RequestError::Failed(ONE_VSOCK.to_owned()));
        }
        let same = |(_, other): &(&String, &VirtioConfig)| {
            config.mac().is_some() && config.mac() == other.mac()
        };
        if let Some((other, _)) = there.chain(coming).find(same) {
            return Err(RequestError::Failed(format!(
                "{} has the same mac as {other}: each NIC needs its own, or none to get a random one",
                config.described(&name)
            )));
        }
        let place = config.place();
        let placed = place.check(self.segments);
        placed.map_err(|error| {
            RequestError::Invalid(format!("{}: {error}", config.described(&name)))
        })?;
        match self.seats.claim(Owner::Virtio, place) {
            Some(slot) => Ok((name, slot)),
            None => Err(RequestError::Failed(self.no_slot(place))),
        }
    }

    /// That there is no empty slot, and what helps.
    fn no_slot(&self, place: PciPlace) -> String {
        if let Some(device) = place.device {
            return format!(
                "slot {device} of bus 0 is taken, or none that devices can come to (1 to 15): take another \
                 pci_device_id, or leave it out"
            );
        }
        let mut names: Vec<_> = self.entries.iter().map(|one| one.name.clone()).collect();
        match self.seats.count(Owner::Assigned) {
            0 => {}
            1 => names.push("an assigned device".to_owned()),
            count => names.push(format!("{count} assigned devices")),
        }
        format!(
            "each of the {} slots of bus 0{} for devices is taken or about to be (it has {}): remove one",
            self.seats.open_slots(place.segment()).count_ones(),
            match place.segment {
                0 => String::new(),
                segment => format!(" of PCI segment {segment}"),
            },
            names.join(", ")
        )
    }

    /// Presents those that have come.
    pub(super) fn on_attached(&mut self, pci: &mut Pci) {
        let come = std::mem::take(&mut *self.come.lock().unwrap_or_else(PoisonError::into_inner));
        for one in come {
            let Some(at) = self.coming.iter().position(|it| it.slot == one.slot) else {
                continue;
            };
            let coming = self.coming.swap_remove(at);
            let (name, config) = (coming.name, coming.config);
            let described = config.described(&name);
            let answer = one
                .outcome
                .and_then(|(config, function)| {
                    self.present(&name, config, coming.files, coming.slot, function, pci)
                })
                .inspect_err(|error| {
                    log::warn!("{described} was not added: {error}");
                    self.seats.give_up(Seat::Low(coming.slot));
                })
                .map_err(|error| RequestError::failed(&error));
            one.asker.answer(answer);
        }
    }

    fn present(
        &mut self,
        name: &str,
        config: VirtioConfig,
        files: Files,
        slot: RootSlot,
        function: Arc<VirtioPci>,
        pci: &mut Pci,
    ) -> Result<Answer, RunError> {
        let described = config.described(name);
        if let Err(error) = pci.plug_virtio(slot, &function) {
            // Closing can take long.
            self.releases
                .start("release", &described, move || drop(function));
            return Err(error);
        }
        self.enter(name.to_owned(), config, files, slot, &function);
        let address = address(slot);
        log::info!("{described}: added at {address}");
        Ok(Answer::Added(Added::one(name.to_owned(), address)))
    }

    fn enter(
        &mut self,
        name: String,
        config: VirtioConfig,
        files: Files,
        slot: RootSlot,
        function: &Arc<VirtioPci>,
    ) {
        self.entries.push(Entry {
            name,
            config,
            files,
            slot,
            function: Arc::downgrade(function),
            sight: function.sight(),
            leaving: None,
            retired: false,
        });
    }
}

impl Drop for VirtioDevices {
    fn drop(&mut self) {
        // What has come and is in no slot is closed with the rest.
        self.builds.finish();
        let come = std::mem::take(&mut *self.come.lock().unwrap_or_else(PoisonError::into_inner));
        drop(come);
    }
}

fn observed(id: String, kind: &'static str, address: String, sight: &Sight) -> DeviceSeen {
    let seen = sight.seen();
    DeviceSeen {
        id,
        kind,
        host: None,
        guest: Some(address),
        state: DeviceState::Present,
        doing: Some(Doing {
            function: seen.function,
            vectors: seen.vectors,
            assigned: None,
            virtio: Some(VirtioDoing {
                driver: seen.driver,
                served_by: seen.served_by,
                interrupts: seen.interrupts,
                totals: seen.totals,
            }),
        }),
    }
}

/// The address in the guest of the function in a slot of bus 0.
fn address(slot: RootSlot) -> String {
    slot.bdf(Function::default()).to_string()
}

/// The name that a device was given, or the first of its kind from `number` on that is free.
pub(super) fn name_of(
    config: &VirtioConfig,
    number: usize,
    is_free: impl Fn(&str) -> bool,
) -> String {
    let word = config.word();
    let made = || {
        let mut names = (number..).map(|number| format!("{word}{number}"));
        names.find(|name| is_free(name)).unwrap_or_default()
    };
    config.id().map_or_else(made, str::to_owned)
}
