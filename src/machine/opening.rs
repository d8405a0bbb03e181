//! Opening the host's devices, in the DMA space that does what the VM needs.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};

use busway_iommu::{Kind, Mode, Space, Way};
use busway_vfio::{DeviceError, KernelDevice, KvmFiles, Opener, TokenUse, VfToken, try_peers};

use super::RunError;
use super::host_devices::HostDevices;
use crate::config::{Choice, DeviceConfig, VmConfig};
use crate::kvm::Vm;
use crate::memory::Ram;
use crate::report::Report;

/// A DMA space and the devices in it. Fields go in the order in which they stand: a space goes after
/// what is attached to it.
type Opened = (Vec<KernelDevice>, Space);

/// A DMA space and the assigned devices in it; nothing where there are none. Says in the report which
/// of the kernel's interfaces it is.
///
/// The devices are opened before RAM is mapped: a VFIO container maps only with a group in it.
pub(super) fn open_devices(
    config: &VmConfig,
    mut host: HostDevices,
    vm: &Vm,
    ram: &Ram,
    report: &Report,
) -> Result<Option<(Space, Vec<KernelDevice>)>, RunError> {
    if config.device.is_empty() {
        return Ok(None);
    }
    let folders: Vec<PathBuf> = host.devices.iter().map(|(each, _)| each.clone()).collect();
    let folders: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
    let peers = config.platform.p2p != Choice::Off;
    let mut way = Way::choose(&host.paths, host.mode, &folders, peers);
    if host.asked == Mode::Auto && host.mode != Mode::Auto {
        way.why = "a descriptor of it was inherited".to_owned();
    }
    // KVM has one such device in each VM.
    let kvm: Arc<dyn KvmFiles> = Arc::new(vm.vfio()?);
    let mut open = |kind| open_by(kind, config, &mut host, &folders, &kvm, ram);
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
    Ok(Some((space, devices)))
}

/// What keeps these devices from reaching each other's memory, where something does.
fn trial((devices, space): &Opened) -> Option<busway_iommu::MapError> {
    let dma = space.dma();
    let mut devices = devices.iter();
    devices.find_map(|device| try_peers(device.name(), device, &*dma).err())
}

/// Opens the devices in a new space of a kind. Inherited descriptors are used up by that.
fn open_by(
    kind: Kind,
    config: &VmConfig,
    host: &mut HostDevices,
    folders: &[&Path],
    kvm: &Arc<dyn KvmFiles>,
    ram: &Ram,
) -> Result<Opened, RunError> {
    let space = Space::open(&host.paths, kind, host.iommufd.take())?;
    space.reserve(&host.paths, ram.size())?;
    let uses: Vec<_> = folders
        .iter()
        .map(|folder| TokenUse::of(&host.paths, folder))
        .collect();
    let opener = Opener::new(host.paths.clone(), space.clone(), Some(kvm.clone()));
    for (folder, handed) in &mut host.devices {
        if let Some(handed) = handed.take() {
            opener.hand(handed, folder)?;
        }
    }
    let opener = &opener;
    let open = |setting: bool| -> Vec<Option<Result<KernelDevice, DeviceError>>> {
        thread::scope(|scope| {
            let devices = config.device.iter().zip(folders).zip(&uses);
            let devices = devices.map(|((device, folder), &used)| {
                let open = move || opener.open(folder, vf_token(config, device, used).as_ref());
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
    Ok((devices.collect::<Result<_, _>>()?, space))
}

/// The VF token of a device: its own or, where it can have one, that of all.
fn vf_token(config: &VmConfig, device: &DeviceConfig, used: TokenUse) -> Option<VfToken> {
    let of_all = config.platform.vf_token.as_ref();
    let token = device
        .vf_token
        .as_ref()
        .or(of_all.filter(|_| used != TokenUse::None));
    // The configuration has been found sound.
    token?.parse().ok()
}
