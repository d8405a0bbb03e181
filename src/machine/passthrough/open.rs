//! Opening the host's devices, in the DMA space that does what the VM needs.

use std::fs::File;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread::{self, ScopedJoinHandle};

use busway_iommu::{IommufdMode, SpaceKind, SysRoot, Way};
use busway_vfio::{DeviceIo, TokenUse, VfToken, try_peers};

use super::find::{Found, Request};
use super::opener::{Joined, MakeSpace, OpenDevice, OpenSpace};
use crate::config::{Choice, DeviceConfig, PlatformConfig};
use crate::machine::RunError;

/// Devices that are open in a DMA space, where nothing may be mapped yet.
///
/// Fields go in the order in which they stand: a space goes after what is attached to it.
#[derive(Debug)]
pub(in crate::machine) struct Opened {
    pub(super) devices: Vec<(Request, Arc<dyn DeviceIo>)>,
    pub(super) space: OpenSpace,
}

/// Devices that are open, in the order in which they were asked for.
type Devices = Vec<Arc<dyn DeviceIo>>;

/// What opening a machine's devices needs besides them.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) platform: PlatformConfig,
    /// Bytes of RAM, all of which is pinned.
    pub(super) ram: u64,
    pub(super) spaces: Box<dyn MakeSpace>,
    /// The iommufd that was inherited or handed over, for spaces that are made later.
    pub(super) iommufd: OnceLock<File>,
}

impl Opening {
    /// Another descriptor of the iommufd that is to be used, where there is one.
    ///
    /// # Errors
    /// fcntl(2), `F_DUPFD_CLOEXEC`
    pub(super) fn iommufd(&self) -> Result<Option<File>, RunError> {
        let file = self.iommufd.get().map(File::try_clone).transpose();
        file.map_err(RunError::system("fcntl"))
    }
}

impl Found {
    /// Opens the devices in a new DMA space, and gives the kernel's interface that it is.
    ///
    /// That is done before RAM is mapped: a VFIO container maps only with a group in it.
    ///
    /// # Errors
    /// [`RunError`], with the device's name and what helps
    pub(super) fn open(mut self, with: &Opening) -> Result<(Opened, Way), RunError> {
        let mut way = self.way(with);
        let mut opened = self.open_by(way.kind, with)?;
        if way.is_on_trial()
            && let Some(error) = self.trial(&opened)
        {
            // Closed before they are opened the other way.
            drop(opened);
            way = Way::instead(&error);
            opened = self.open_by(way.kind, with)?;
        }
        log::info!("devices are reached by {way}");
        let (devices, space) = opened;
        Ok((self.opened(devices, space), way))
    }

    /// A new DMA space for these devices, where memory can be mapped before any of them is open, so that
    /// nobody else waits for the kernel to reset them. Nothing where the interface has to be tried with open
    /// devices, which [`open`](Self::open) does.
    ///
    /// # Errors
    /// [`RunError`], with the device's name and what helps
    pub(super) fn make_space(
        &mut self,
        with: &Opening,
    ) -> Result<Option<(OpenSpace, Joined)>, RunError> {
        let way = self.way(with);
        let Some(first) = self.requests.first().filter(|_| !way.is_on_trial()) else {
            return Ok(None);
        };
        let folder = first.identity.folder.clone();
        let space = self.new_space(way.kind, with)?;
        let joined = space.join(&folder)?;
        log::info!("devices are reached by {way}");
        Ok(Some((space, joined)))
    }

    /// Which of the kernel's interfaces it is to be.
    fn way(&self, with: &Opening) -> Way {
        let requests = self.requests.iter();
        let folders: Vec<_> = requests.map(|one| &*one.identity.folder).collect();
        let peers = with.platform.p2p != Choice::Off;
        let mut way = Way::choose(&self.paths, self.mode, &folders, peers);
        if self.asked == IommufdMode::Auto && self.mode != IommufdMode::Auto {
            way.why = "a descriptor of it was inherited".to_owned();
        }
        way
    }

    /// Opens the devices in a space that there is.
    ///
    /// # Errors
    /// [`RunError`], with the device's name and what helps
    pub(super) fn open_in(mut self, space: OpenSpace, with: &Opening) -> Result<Opened, RunError> {
        let devices = self.open_all(&*space, &with.platform)?;
        Ok(self.opened(devices, space))
    }

    /// Opens the devices in a new space of a kind. Inherited descriptors are used up by that.
    fn open_by(
        &mut self,
        kind: SpaceKind,
        with: &Opening,
    ) -> Result<(Devices, OpenSpace), RunError> {
        let space = self.new_space(kind, with)?;
        let devices = self.open_all(&*space, &with.platform)?;
        Ok((devices, space))
    }

    fn new_space(&mut self, kind: SpaceKind, with: &Opening) -> Result<OpenSpace, RunError> {
        with.spaces.make(kind, self.iommufd.take(), with.ram)
    }

    fn open_all(
        &mut self,
        opener: &dyn OpenDevice,
        platform: &PlatformConfig,
    ) -> Result<Devices, RunError> {
        for one in &mut self.requests {
            if let Some(inherited) = one.inherited.take() {
                opener.inherit(inherited, &one.identity.folder)?;
            }
        }
        open_all(&self.paths, &self.requests, platform, opener)
    }

    /// What keeps these devices from reaching each other's memory, where something does.
    fn trial(&self, (devices, space): &(Devices, OpenSpace)) -> Option<busway_iommu::MapError> {
        let dma = space.dma();
        let mut devices = self.requests.iter().zip(devices);
        devices.find_map(|(one, device)| try_peers(&one.identity.name(), &**device, &*dma).err())
    }

    fn opened(self, devices: Devices, space: OpenSpace) -> Opened {
        Opened {
            devices: self.requests.into_iter().zip(devices).collect(),
            space,
        }
    }
}

/// Opens each device on a thread of its own, for the kernel resets it meanwhile.
fn open_all(
    paths: &SysRoot,
    requests: &[Request],
    platform: &PlatformConfig,
    opener: &dyn OpenDevice,
) -> Result<Devices, RunError> {
    let uses: Vec<_> = requests
        .iter()
        .map(|one| TokenUse::of(paths, &one.identity.folder))
        .collect();
    let open = |setting: bool| -> Vec<Option<Result<Arc<dyn DeviceIo>, RunError>>> {
        thread::scope(|scope| {
            let devices = requests.iter().zip(&uses).map(|(one, &used)| {
                let folder: &Path = &one.identity.folder;
                let token = vf_token(platform, &one.config, used);
                let open = move || opener.open(folder, token.as_ref());
                ((used == TokenUse::Sets) == setting).then(|| scope.spawn(open))
            });
            let opening: Vec<_> = devices.collect();
            let join = |thread: ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| resume_unwind(panic))
            };
            opening.into_iter().map(|thread| thread.map(join)).collect()
        })
    };
    // Opening a physical function says which token its virtual functions have.
    let (first, then) = (open(true), open(false));
    let devices = first.into_iter().zip(then).filter_map(|(a, b)| a.or(b));
    devices.collect()
}

/// The VF token of a device: its own or, where it can have one, that of all.
fn vf_token(platform: &PlatformConfig, device: &DeviceConfig, used: TokenUse) -> Option<VfToken> {
    let of_all = platform.vf_token.as_ref();
    let token = device
        .vf_token
        .as_ref()
        .or(of_all.filter(|_| used != TokenUse::None));
    // The configuration has been found sound.
    token?.parse().ok()
}
