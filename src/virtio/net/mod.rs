//! The virtio network card on a tap interface. Virtio 1.3 §5.1.
//!
//! A worker for each pair of queues, on the tap's own queue of the same number; or the host's kernel serves
//! them (`vhost=`), and no packet comes by this process. What the driver agrees to handle unfinished (checksums,
//! segments), the kernel hands over so, and the other way.

mod cable;
mod control;
mod features;
mod frame;
mod kernel;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod worker;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use busway_host::Mac;
use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

use super::activation::Activation;
use super::config_space::{ConfigSpace, Fields};
use super::counts::{Counts, ServedBy};
use super::device::VirtioDevice;
use super::life::{DeviceState, NetState, Progress, Running};
use super::queue::Virtqueue;
use super::spec::{self, net};
use super::vhost::{self, KernelError, MemoryTable, Watch};
use super::worker::Worker;
use crate::config::{Choice, InvalidVirtio, NetConfig};
use crate::memory::GuestRam;
use crate::shortage;
use crate::virtio::error::StartError;
use busway_pci::Complaints;
pub use cable::Cable;
pub(in crate::virtio) use control::{Commanded, Control};
use features::GUEST_OFFLOADS;
pub(in crate::virtio) use features::{founded, have_what_they_stand_on};
use frame::Rules;
use kernel::{Kernel, KernelWorker};
use receive::Receiver;
use tap::Tap;
pub use tap::TapError;
pub(crate) use tap::keep_host_network;
use transmit::Transmitter;
use worker::NetWorker;

/// Descriptors of a control queue.
pub(in crate::virtio) const CONTROL_QUEUE_SIZE: u16 = 64;
/// Refused control commands of one card that are warnings in the log.
const LOGGED_ERRORS: u32 = 8;

/// `struct virtio_net_config`, as far as it is offered. Virtio 1.3 §5.1.4.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct NetworkConfig {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

/// A network card cannot be as configured, or the host does not let us have its tap.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// net {name}: {source}
    #[error("net {name}: {source}")]
    Config {
        /// The card.
        name: String,
        /// What is wrong, and what would be right.
        source: InvalidVirtio,
    },
    /// net {name}: {source}
    #[error("net {name}: {source}")]
    Tap {
        /// The card.
        name: String,
        /// What became of its tap.
        source: TapError,
    },
    /// net {name}: vhost=on: {source}, or leave vhost= out
    #[error("net {name}: vhost=on: {source}; or leave vhost= out, and Busway serves it")]
    Kernel {
        /// The card.
        name: String,
        /// Why the kernel does not serve it.
        source: KernelError,
    },
    /// net {name}: no random MAC address: {source}; give one with mac=
    #[error("net {name}: no random MAC address: {source}; give one with mac=")]
    Mac {
        /// The card.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// A virtio network card.
#[derive(Debug)]
pub struct Net {
    name: String,
    tap: Arc<Tap>,
    /// Busway has opened it, by its name.
    tap_is_ours: bool,
    mac: Mac,
    /// The longest packet, without its Ethernet header, where that was said; bytes.
    mtu: Option<u16>,
    /// What comes from the guest has to be from `mac`.
    checks_source: bool,
    pairs: u16,
    queue_size: u16,
    config: Arc<Fields>,
    cable: Arc<Cable>,
    counts: Counts,
    complaints: Arc<Complaints>,
    /// Where the kernel serves its queues.
    kernel: Option<Kernel>,
}

impl Net {
    /// Opens the tap, or takes the one whose queues were passed: in `files`, or inherited by the numbers that the
    /// configuration has. These are this card's from then on. `name` is the card's in this VM.
    ///
    /// # Errors
    /// [`NetError`]
    pub fn new(name: &str, config: &NetConfig, files: &[OwnedFd]) -> Result<Self, NetError> {
        config.check().map_err(|source| NetError::Config {
            name: name.to_owned(),
            source,
        })?;
        let pairs = config.num_queues / 2;
        let mac = match config.mac {
            Some(mac) => mac,
            None => random_mac().map_err(|source| NetError::Mac {
                name: name.to_owned(),
                source,
            })?,
        };
        let tap = match (files, config.fd.as_slice()) {
            ([], []) => Tap::open(config.tap.as_deref(), pairs),
            ([], numbers) => {
                let files = numbers.iter().map(|&number| tap::inherit(number));
                let files: Result<Vec<_>, _> = files.collect();
                files.and_then(|files| Tap::adopt(&files, pairs))
            }
            (files, _) => Tap::adopt(files, pairs),
        };
        let of_tap = |source| NetError::Tap {
            name: name.to_owned(),
            source,
        };
        let tap = tap.map_err(of_tap)?;
        let ours = files.is_empty() && config.fd.is_empty();
        // A tap that somebody else has opened may be in another network namespace, and its MTU is theirs to set.
        if let Some(mtu) = config.mtu.filter(|_| ours) {
            tap.set_mtu(mtu).map_err(of_tap)?;
        }
        Ok(Self::on(name, config, mac, tap, ours))
    }

    /// On a tap whose queues are there.
    fn on(name: &str, config: &NetConfig, mac: Mac, tap: Tap, tap_is_ours: bool) -> Self {
        let pairs = config.num_queues / 2;
        let card = NetworkConfig {
            mac: mac.0,
            status: net::S_LINK_UP.into(),
            max_virtqueue_pairs: pairs.into(),
            mtu: config.mtu.unwrap_or(0).into(),
        };
        let config_space = Fields::new(card.as_bytes().to_vec());
        Self {
            name: name.to_owned(),
            tap: Arc::new(tap),
            tap_is_ours,
            mac,
            mtu: config.mtu,
            checks_source: config.spoofchk,
            pairs,
            queue_size: config.queue_size,
            cable: Cable::new(Arc::clone(&config_space)),
            config: config_space,
            counts: Counts::of_net(pairs),
            complaints: Arc::new(Complaints::first(LOGGED_ERRORS)),
            kernel: None,
        }
    }

    /// On sockets in the place of a tap, one for each pair of queues.
    #[cfg(any(test, feature = "hostile"))]
    pub(super) fn on_sockets(name: &str, sockets: Vec<OwnedFd>) -> Self {
        let config = NetConfig {
            num_queues: 2 * sockets.len() as u16,
            mtu: Some(1500),
            ..NetConfig::default()
        };
        let mac = Mac::local([0, 1, 2, 3, 4, 5]);
        Self::on(name, &config, mac, Tap::made_up(sockets), false)
    }

    /// Has the kernel serve its queues, as `choice` says: where that is left to Busway, if the host's vhost-net can
    /// be opened and nothing is asked of the card that it does not do, which is to look at the guest's addresses. It is
    /// told of the guest's memory by `memory`. Called before the card is started.
    ///
    /// # Errors
    /// [`NetError::Kernel`], where it was asked for and cannot be.
    pub fn serve_in_kernel(
        &mut self,
        choice: Choice,
        ram: &GuestRam,
        memory: &Arc<MemoryTable>,
    ) -> Result<(), NetError> {
        if choice == Choice::Off || self.checks_source {
            return Ok(());
        }
        match (Kernel::open(&self.tap, ram, memory), choice) {
            (Ok(kernel), _) => {
                self.kernel = Some(kernel);
                // A tap that somebody else has opened may be in another network namespace.
                self.counts = match self.tap_is_ours {
                    true => Counts::of_tap(self.tap.name()),
                    false => Counts::default(),
                };
                Ok(())
            }
            (Err(source), Choice::On) => Err(NetError::Kernel {
                name: self.name.clone(),
                source,
            }),
            (Err(error), _) => {
                let level = match shortage::remedy_of_descriptors(&error, "") {
                    Some(_) => log::Level::Warn,
                    None => log::Level::Debug,
                };
                log::log!(
                    level,
                    "net {}: Busway serves it, for the host's kernel does not: {}",
                    self.name,
                    shortage::explained(&error)
                );
                Ok(())
            }
        }
    }

    /// The tap interface's name on the host.
    pub fn tap_name(&self) -> &str {
        self.tap.name()
    }

    /// The card's cable, to be pulled and plugged in while the guest runs.
    #[must_use]
    pub fn cable(&self) -> Arc<Cable> {
        Arc::clone(&self.cable)
    }

    /// The guest's MAC address.
    pub fn mac(&self) -> Mac {
        self.mac
    }
}

impl Net {
    /// The pairs of queues that a driver which agreed on `features` knows of. The control queue follows
    /// them. Virtio 1.3 §5.1.2.
    fn pairs_known(&self, features: u64) -> u16 {
        if features & net::F_MQ != 0 {
            self.pairs
        } else {
            1
        }
    }

    fn control(&self, features: u64, state: &NetState) -> Control {
        let (tap, complaints) = (Arc::clone(&self.tap), Arc::clone(&self.complaints));
        let pairs = self.pairs_known(features);
        Control::new(tap as _, pairs, features, state, complaints)
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        spec::device_type::NET
    }

    fn class(&self) -> u32 {
        0x02_00_00 // network controller, Ethernet
    }

    fn features(&self) -> u64 {
        let mut features = net::F_CSUM
            | net::F_GUEST_CSUM
            | net::F_CTRL_GUEST_OFFLOADS
            | net::F_MAC
            | net::F_GUEST_TSO4
            | net::F_GUEST_TSO6
            | net::F_GUEST_ECN
            | net::F_HOST_TSO4
            | net::F_HOST_TSO6
            | net::F_HOST_ECN
            | net::F_MRG_RXBUF
            | net::F_STATUS
            | net::F_CTRL_VQ;
        if self.pairs > 1 {
            features |= net::F_MQ;
        }
        if self.mtu.is_some() {
            features |= net::F_MTU;
        }
        if self.tap.has_uso() {
            features |= features::USO;
        }
        match &self.kernel {
            Some(kernel) => kernel.card_features(features),
            None => features,
        }
    }

    fn ring_features(&self) -> u64 {
        let own = spec::feature::EVENT_IDX | spec::feature::INDIRECT_DESC;
        self.kernel.as_ref().map_or(own, Kernel::ring_features)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.queue_size; usize::from(self.pairs) * 2];
        sizes.push(CONTROL_QUEUE_SIZE);
        sizes
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as _
    }

    fn served_by(&self) -> ServedBy {
        match self.kernel {
            Some(_) => ServedBy::Kernel,
            None => ServedBy::Busway,
        }
    }

    fn counts(&self) -> Counts {
        self.counts.clone()
    }

    fn accepts(&self, features: u64) -> bool {
        have_what_they_stand_on(features)
    }

    fn takes(&self, features: u64, state: &DeviceState) -> bool {
        match state {
            DeviceState::None => true,
            DeviceState::Net(state) => state.fits(features, self.pairs_known(features)),
            _ => false,
        }
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let features = activation.features();
        let mut state = match activation.state() {
            DeviceState::Net(state) => state.clone(),
            _ => NetState::at_reset(features),
        };
        self.tap.set_offloads(state.offloads)?;
        self.tap.use_pairs(state.pairs)?;
        if *activation.state() == DeviceState::None {
            self.tap.discard_waiting();
        }
        let pairs = self.pairs_known(features);
        let mut control = if features & net::F_CTRL_VQ != 0 {
            let queue = activation.take_queue(pairs.saturating_mul(2))?;
            queue.map(|queue| (queue, self.control(features, &state)))
        } else {
            None
        };
        if let Some(kernel) = &self.kernel {
            // The kernel takes packets from the tap alone; these are lost, as on a wire.
            state.waiting.clear();
            let rings = kernel.start(&self.name, pairs, &mut activation)?;
            kernel::follow(&self.cable, &rings, &self.tap);
            let worker = Box::new(KernelWorker {
                name: self.name.clone(),
                ram: activation.ram().clone(),
                watch: Watch::new(&rings),
                control,
            });
            return vhost::run(activation, rings, worker, DeviceState::Net(state));
        }
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        let from_host = Rules {
            mtu: self.mtu.filter(|_| features & net::F_MTU != 0),
            source: None,
        };
        let from_guest = Rules {
            source: self.checks_source.then_some(self.mac),
            ..from_host
        };
        for pair in 0..pairs {
            let queues = (
                activation.take_queue(2 * pair)?,
                activation.take_queue(2 * pair + 1)?,
            );
            let ((Some(receive), Some(transmit)), Some(queue)) =
                (queues, self.tap.queue(pair.into()))
            else {
                continue;
            };
            workers.push(Box::new(NetWorker {
                name: format!("{}-q{pair}", self.name),
                pair,
                ram: activation.ram().clone(),
                queue: Arc::clone(queue),
                tap: Arc::clone(&self.tap),
                cable: Arc::clone(&self.cable),
                counts: self.counts.net_pair(pair),
                receive,
                transmit,
                receiver: Receiver::new(features, from_host, &state.take_packet(pair)),
                transmitter: Transmitter::new(features, from_guest),
                control: control.take(),
            }));
        }
        activation.run(workers, DeviceState::Net(state))
    }
}

impl NetState {
    /// As a driver that agreed on `features` finds it. Virtio 1.3 §5.1.6.5.5 and §5.1.6.5.8.
    pub(in crate::virtio) fn at_reset(features: u64) -> Self {
        Self {
            pairs: 1,
            offloads: features & GUEST_OFFLOADS,
            waiting: Vec::new(),
        }
    }

    /// Whether a run with these features, of which the driver knows `pairs` pairs, could have left it.
    pub(in crate::virtio) fn fits(&self, features: u64, pairs: u16) -> bool {
        (1..=pairs).contains(&self.pairs)
            && self.offloads & !(features & GUEST_OFFLOADS) == 0
            && have_what_they_stand_on(self.offloads)
            && self.waiting.len() <= usize::from(pairs)
            && self
                .waiting
                .iter()
                .all(|packet| packet.pair < pairs && receive::is_packet(&packet.bytes))
    }

    fn take_packet(&mut self, pair: u16) -> Vec<u8> {
        let at = self.waiting.iter().position(|packet| packet.pair == pair);
        at.map(|at| self.waiting.swap_remove(at).bytes)
            .unwrap_or_default()
    }
}

/// Notes the position in the control queue, and what was chosen by it.
pub(in crate::virtio) fn leave_control(
    control: Option<&(Virtqueue, Control)>,
    progress: &mut Progress,
) {
    let Some((queue, control)) = control else {
        return;
    };
    queue.leave(progress);
    if let DeviceState::Net(state) = &mut progress.device {
        (state.pairs, state.offloads) = control.chosen();
    }
}

/// An address of no vendor's.
pub(in crate::virtio) fn random_mac() -> io::Result<Mac> {
    let mut bytes = [0; 6];
    io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
    Ok(Mac::local(bytes))
}
