//! Opening the host's devices, in the DMA space that does what the VM needs.

use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};

use busway_iommu::{HostPaths, Kind, Mode, Space, Way};
use busway_vfio::{DeviceError, KernelDevice, KvmFiles, Opener, TokenUse, VfToken, try_peers};

use super::find::{Found, Request};
use crate::config::{Choice, DeviceConfig, PlatformConfig};
use crate::kvm::Vm;
use crate::machine::RunError;
use crate::memory::Ram;
use crate::report::Report;

/// Devices that are open, in a DMA space where nothing is mapped yet.
///
/// Fields go in the order in which they stand: a space goes after what is attached to it.
#[derive(Debug)]
pub(in crate::machine) struct Opened {
    pub(super) devices: Vec<(Request, KernelDevice)>,
    pub(super) space: Space,
}

impl Found {
    /// Opens the devices in a new DMA space; nothing where there are none. Says in the report which of
    /// the kernel's interfaces it is.
    ///
    /// That is done before RAM is mapped: a VFIO container maps only with a group in it.
    ///
    /// # Errors
    /// [`RunError`], with the device's name and what helps
    pub(in crate::machine) fn open(
        mut self,
        platform: &PlatformConfig,
        vm: &Vm,
        ram: &Ram,
        report: &Report,
    ) -> Result<Option<Opened>, RunError> {
        if self.requests.is_empty() {
            return Ok(None);
        }
        let requests = self.requests.iter();
        let folders: Vec<_> = requests.map(|one| &*one.identity.folder).collect();
        let peers = platform.p2p != Choice::Off;
        let mut way = Way::choose(&self.paths, self.mode, &folders, peers);
        if self.asked == Mode::Auto && self.mode != Mode::Auto {
            way.why = "a descriptor of it was inherited".to_owned();
        }
        // KVM has one such device in each VM.
        let kvm: Arc<dyn KvmFiles> = Arc::new(vm.vfio()?);
        let mut open = |kind| self.open_by(kind, platform, &kvm, ram);
        let mut opened = open(way.kind)?;
        if way.is_on_trial()
            && let Some(error) = trial(&opened)
        {
            // Closed before they are opened the other way.
            drop(opened);
            way = Way::instead(&error);
            opened = open(way.kind)?;
        }
        log::info!("devices are reached by {way}");
        report.set_iommu(way.kind.word(), &way.why);
        let (devices, space) = opened;
        let devices = self.requests.into_iter().zip(devices).collect();
        Ok(Some(Opened { devices, space }))
    }

    /// Opens the devices in a new space of a kind. Inherited descriptors are used up by that.
    fn open_by(
        &mut self,
        kind: Kind,
        platform: &PlatformConfig,
        kvm: &Arc<dyn KvmFiles>,
        ram: &Ram,
    ) -> Result<(Vec<KernelDevice>, Space), RunError> {
        let space = Space::open(&self.paths, kind, self.iommufd.take())?;
        space.reserve(&self.paths, ram.size())?;
        let opener = Opener::new(self.paths.clone(), space.clone(), Some(kvm.clone()));
        for one in &mut self.requests {
            if let Some(inherited) = one.inherited.take() {
                opener.hand(inherited, &one.identity.folder)?;
            }
        }
        let devices = open_all(&self.paths, &self.requests, platform, &opener)?;
        Ok((devices, space))
    }
}

/// Opens each device on a thread of its own, for the kernel resets it meanwhile.
fn open_all(
    paths: &HostPaths,
    requests: &[Request],
    platform: &PlatformConfig,
    opener: &Opener,
) -> Result<Vec<KernelDevice>, DeviceError> {
    let uses: Vec<_> = requests
        .iter()
        .map(|one| TokenUse::of(paths, &one.identity.folder))
        .collect();
    let open = |setting: bool| -> Vec<Option<Result<KernelDevice, DeviceError>>> {
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

/// What keeps these devices from reaching each other's memory, where something does.
fn trial((devices, space): &(Vec<KernelDevice>, Space)) -> Option<busway_iommu::MapError> {
    let dma = space.dma();
    let mut devices = devices.iter();
    devices.find_map(|device| try_peers(device.name(), device, &*dma).err())
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
