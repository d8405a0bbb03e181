//! Virtual functions of a device: made, set, listed and removed.

use std::collections::BTreeMap;

use busway_pci::Bdf;

use super::device::{HostDevice, HostError};
use super::host::Host;
use super::identity::HardwareIds;
use super::journal::{Journal, JournalError};
use super::lock::LockError;
use super::modules::module_parameter;
use super::netlink::{VfSetting, VfState};
use super::root::{self, SysRoot};
use super::session::Session;
use super::steps::{Step, StepError};
use super::usage::{Usage, represents};

/// What is to become of a device's virtual functions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VfsOptions {
    /// How many there are to be; none: as many as there are.
    pub count: Option<u16>,
    /// What each is set to, by its number.
    pub settings: BTreeMap<u32, Vec<VfSetting>>,
    /// Whether the host's drivers are kept from them, until they are removed or restored.
    pub no_autoprobe: bool,
}

/// A device and its virtual functions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Functions {
    /// The physical function.
    pub physical: Bdf,
    /// How many it can make.
    pub total: u16,
    /// Its network interface, and whether that is up.
    pub interface: Option<(String, bool)>,
    /// Those that there are, by number.
    pub functions: Vec<Function>,
}

/// A virtual function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its number, from 0.
    pub index: u32,
    /// Where it sits.
    pub address: Bdf,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// What it is set to, where it is a network's.
    pub state: Option<VfState>,
}

/// Virtual functions were not made, set or removed as asked, and nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum VfsRefusal {
    /// {0}: there is no such PCI device
    #[error("{0}: there is no such PCI device\n  see those there are: busway device list")]
    NotThere(Bdf),
    /// {0} cannot make virtual functions
    #[error(
        "{0} cannot make virtual functions: it has no SR-IOV\n  \
         where it should have, turn SR-IOV on in the firmware's set-up and the card's own"
    )]
    NotCapable(Bdf),
    /// {address} is a virtual function itself
    #[error(
        "{address} is a virtual function itself\n  name the one that made it: busway device vfs {physical}"
    )]
    IsVirtual {
        /// The function.
        address: Bdf,
        /// What made it.
        physical: Bdf,
    },
    /// {address} makes at most {total} virtual functions
    #[error("{address} makes at most {total} virtual functions, not {asked}")]
    TooMany {
        /// The device.
        address: Bdf,
        /// How many were asked for.
        asked: u16,
        /// How many it makes.
        total: u16,
    },
    /// {address} has no driver of the host's
    #[error(
        "{address} is with {}, and its own driver is what makes virtual functions\n  \
         give it back first: busway device unbind {address}",
        driver.as_deref().unwrap_or("no driver")
    )]
    NoDriver {
        /// The device.
        address: Bdf,
        /// The driver that has it.
        driver: Option<String>,
    },
    /// the virtual functions of {address} are in use
    #[error("the virtual functions of {address} cannot be removed: some are in use{}\n  end that first", Uses(.uses))]
    InUse {
        /// The device.
        address: Bdf,
        /// The functions in use, and by what.
        uses: Vec<(Bdf, Vec<Usage>)>,
    },
    /// {address} has no virtual function {index}
    #[error("{address} has no virtual function {index}: it has {count}, from 0 up")]
    NoFunction {
        /// The device.
        address: Bdf,
        /// The number.
        index: u32,
        /// How many there are, or would be.
        count: u32,
    },
    /// {0} has no network interface
    #[error("{0} has no network interface, through which virtual functions are set")]
    NoInterface(Bdf),
}

struct Uses<'a>(&'a [(Bdf, Vec<Usage>)]);

impl std::fmt::Display for Uses<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (address, uses) in self.0 {
            let uses: Vec<_> = uses.iter().map(Usage::to_string).collect();
            write!(f, "\n  {address}: {}", uses.join(", "))?;
        }
        Ok(())
    }
}

impl VfsRefusal {
    /// Whether what was asked for does not make sense, rather than that the host cannot do it.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::NotThere(_)
                | Self::IsVirtual { .. }
                | Self::TooMany { .. }
                | Self::NoFunction { .. }
        )
    }
}

/// Virtual functions are not as asked.
#[derive(Debug, thiserror::Error)]
pub enum VfsError {
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// They cannot be as asked. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] VfsRefusal),
    /// Somebody else is changing devices. Nothing was changed.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// What devices had before cannot be read. Nothing was changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A step failed, and virtual functions that were new were removed.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// Makes, sets or removes virtual functions of the device at `address`, and tells which there are
/// then. New ones are set before any driver sees them.
///
/// # Errors
///
/// Where something stands against it, with nothing changed; or where a step failed, with new ones
/// removed again.
pub fn vfs(
    session: &mut Session<'_>,
    address: Bdf,
    options: &VfsOptions,
) -> Result<Functions, VfsError> {
    let changes = options.count.is_some() || !options.settings.is_empty();
    check(&Host::read(session.root)?, address, options)?;
    if !changes {
        return read(session, address);
    }
    let _lock = session.lock()?;
    let host = Host::read(session.root)?;
    let present = check(&host, address, options)?;
    // Who asks for functions without keeping drivers from them lets drivers have them again.
    if options.count == Some(0) || (options.count.is_some() && !options.no_autoprobe) {
        end_withholding(session, &mut Journal::read(session.root)?, address)?;
    }
    let interface = interface(session.root, address);
    let count = options
        .count
        .filter(|&count| usize::from(count) != present.len());
    if let Some(count) = count {
        if !present.is_empty() {
            remove(session, address, &present)?;
        }
        if count > 0 {
            let identity = host.device(address).map(HardwareIds::of);
            make(
                session,
                (address, identity),
                count,
                options,
                interface.as_deref(),
            )?;
        }
    } else if let Some(interface) = &interface {
        set_all(session, interface, options)?;
    }
    read(session, address)
}

/// The virtual functions that there are, where nothing stands against it.
fn check(host: &Host, address: Bdf, options: &VfsOptions) -> Result<Vec<Bdf>, VfsRefusal> {
    let device = host.device(address).ok_or(VfsRefusal::NotThere(address))?;
    if let Some(physical) = device.physical_function {
        return Err(VfsRefusal::IsVirtual { address, physical });
    }
    let sriov = device
        .sriov
        .as_ref()
        .ok_or(VfsRefusal::NotCapable(address))?;
    let total = sriov.total;
    let present = sriov.functions.clone();
    if let Some(asked) = options.count.filter(|&asked| asked > total) {
        return Err(VfsRefusal::TooMany {
            address,
            asked,
            total,
        });
    }
    let count = options.count.map_or(present.len(), usize::from);
    if options
        .count
        .is_some_and(|asked| usize::from(asked) != present.len())
    {
        // vfio-pci makes them where it was told to (drivers/vfio/pci/vfio_pci.c, enable_sriov).
        let reported = || module_parameter(&host.root, "vfio_pci", "enable_sriov");
        let reported = || matches!(reported().as_deref(), Some("Y" | "y" | "1"));
        if device.driver.is_none() || (device.is_with_vfio() && !reported()) {
            let driver = device.driver.clone();
            return Err(VfsRefusal::NoDriver { address, driver });
        }
        refuse_in_use(host, device, &present)?;
    }
    if let Some((&index, _)) = options
        .settings
        .iter()
        .find(|(index, _)| **index as usize >= count)
    {
        let count = count as u32;
        return Err(VfsRefusal::NoFunction {
            address,
            index,
            count,
        });
    }
    if !options.settings.is_empty() && interface(&host.root, address).is_none() {
        return Err(VfsRefusal::NoInterface(address));
    }
    Ok(present)
}

fn refuse_in_use(host: &Host, device: &HostDevice, functions: &[Bdf]) -> Result<(), VfsRefusal> {
    let used = |&function: &Bdf| {
        let uses = host
            .usage(function)
            .iter()
            .filter(|usage| usage.prevents_bind());
        let uses: Vec<_> = uses.cloned().collect();
        (!uses.is_empty()).then_some((function, uses))
    };
    let uses: Vec<_> = functions.iter().filter_map(used).collect();
    let address = device.address;
    match uses.is_empty() {
        true => Ok(()),
        false => Err(VfsRefusal::InUse { address, uses }),
    }
}

fn remove(session: &mut Session<'_>, address: Bdf, functions: &[Bdf]) -> Result<(), VfsError> {
    let mut journal = Journal::read(session.root)?;
    session.take(Step::Functions { address, count: 0 })?;
    // What comes to their addresses is new.
    functions
        .iter()
        .for_each(|&function| journal.remove(function));
    Ok(journal.save(session)?)
}

/// Lets the host's drivers have virtual functions of a device again, where Busway keeps them from these:
/// because that was asked for, or because a process ended while it made them. Returns whether that was so.
pub(super) fn end_withholding(
    session: &mut Session<'_>,
    journal: &mut Journal,
    address: Bdf,
) -> Result<bool, StepError> {
    let Some(identity) = journal.withheld(address) else {
        return Ok(false);
    };
    let ids = |name: &str| root::hex(&session.root.device(address).join(name));
    let is_the_same = ids("vendor") == Some(identity.vendor.into())
        && ids("device") == Some(identity.device.into());
    if is_the_same {
        session.take(Step::Autoprobe { address, on: true })?;
    }
    journal.withhold(address, None);
    journal.save(session)?;
    Ok(is_the_same)
}

fn make(
    session: &mut Session<'_>,
    (address, identity): (Bdf, Option<HardwareIds>),
    count: u16,
    options: &VfsOptions,
    interface: Option<&str>,
) -> Result<(), VfsError> {
    let autoprobe = root::text(&session.root.device(address).join("sriov_drivers_autoprobe"));
    // A driver reads what its device is set to when it gets it.
    let hold =
        (options.no_autoprobe || !options.settings.is_empty()) && autoprobe.as_deref() == Some("1");
    let mut journal = Journal::read(session.root)?;
    let mut steps = || {
        if hold {
            // Whoever ends this process in the middle leaves it to `restore`.
            journal.withhold(address, identity);
            journal.save(session)?;
            session.take(Step::Autoprobe { address, on: false })?;
        }
        session.take(Step::Functions { address, count })?;
        if let Some(interface) = interface {
            set_all(session, interface, options)?;
        }
        // Kept for as long as there are functions: a driver that is loaded later would take them, too.
        if options.no_autoprobe {
            return Ok(());
        }
        end_withholding(session, &mut journal, address)?;
        // In a dry run those that there are were there before, and are not the ones to be made.
        if hold && !session.is_dry() {
            for (_, function) in functions(session.root, address) {
                session.probe(function)?;
            }
        }
        Ok(())
    };
    let result: Result<(), StepError> = steps();
    result.map_err(|source| {
        session.undo();
        if !functions(session.root, address).is_empty()
            && let Err(error) = session.take(Step::Functions { address, count: 0 })
        {
            log::warn!("{error}");
        }
        if let Err(error) = end_withholding(session, &mut journal, address) {
            log::warn!("{error}\n  try again: busway device restore {address}");
        }
        source.into()
    })
}

fn set_all(
    session: &mut Session<'_>,
    interface: &str,
    options: &VfsOptions,
) -> Result<(), StepError> {
    for (&vf, settings) in &options.settings {
        for &setting in settings {
            session.take(Step::SetFunction {
                interface: interface.to_owned(),
                vf,
                setting,
            })?;
        }
    }
    Ok(())
}

/// What there is now.
fn read(session: &mut Session<'_>, address: Bdf) -> Result<Functions, VfsError> {
    let host = Host::read(session.root)?;
    let device = host.device(address).ok_or(VfsRefusal::NotThere(address))?;
    let interface = interface(session.root, address);
    let states = interface.as_deref().and_then(|interface| {
        let index = root::number(&folder(session.root, interface).join("ifindex"))?;
        let states = session.kernel.vf_states(index);
        states
            .inspect_err(|error| log::warn!("{interface} does not tell of its functions: {error}"))
            .ok()
    });
    let states = states.unwrap_or_default();
    let functions = functions(session.root, address).into_iter();
    let function = |(index, address): (u32, Bdf)| Function {
        index,
        address,
        group: host.device(address).and_then(|device| device.group),
        driver: host
            .device(address)
            .and_then(|device| device.driver.clone()),
        state: states.get(&index).copied(),
    };
    let is_up = |interface: String| {
        // IFF_UP is the lowest bit (linux/if.h).
        let flags = root::hex(&folder(session.root, &interface).join("flags"));
        (interface, flags.is_none_or(|flags| flags & 1 != 0))
    };
    Ok(Functions {
        physical: address,
        total: device.sriov.as_ref().map_or(0, |sriov| sriov.total),
        functions: functions.map(function).collect(),
        interface: interface.map(is_up),
    })
}

/// The virtual functions by number, as the kernel's links `virtfnN` have them.
fn functions(root: &SysRoot, address: Bdf) -> Vec<(u32, Bdf)> {
    let folder = root.device(address);
    let names = root::names(&folder);
    let function = |name: &String| {
        let index = name.strip_prefix("virtfn")?.parse().ok()?;
        let address = root::link_name(&folder.join(name))?.parse().ok()?;
        Some((index, address))
    };
    let mut functions: Vec<_> = names.iter().filter_map(function).collect();
    functions.sort_unstable();
    functions
}

fn folder(root: &SysRoot, interface: &str) -> std::path::PathBuf {
    root.sys.join("class/net").join(interface)
}

/// The physical function's own network interface: the first that does not stand for another port or
/// function behind it, which in a switch are named `pf0vf3`.
fn interface(root: &SysRoot, address: Bdf) -> Option<String> {
    let names = root::names(&root.device(address).join("net"));
    names.into_iter().find(|name| !represents(root, name))
}
