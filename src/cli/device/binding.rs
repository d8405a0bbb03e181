//! `busway device bind`, `unbind` and `restore`: their words, and what they say when they are done.

use busway_host::{
    AtBoot, BindOptions, Bound, Called, Kernel, Outcome, Persist, RestoreError, Restored, Session,
    Step, SysRoot, UnbindError, Unbound, is_vfio_driver,
};
use clap::{ArgGroup, Args};

use super::permits::{BindPermits, UnbindPermits};
use super::{DeviceCommandError, find};

/// `busway device bind`
#[derive(Args, Clone, Debug)]
pub struct BindArgs {
    /// The devices: 0000:01:00.0, 01:00.0, 10de:1b81, wlp3s0, nvme0n1, or files of sysfs
    #[arg(value_name = "DEVICE", required_unless_present = "persisted")]
    pub addresses: Vec<Called>,

    /// Take this VFIO driver, and not the one that the kernel has for the device
    #[arg(long, value_name = "NAME", value_parser = vfio_driver)]
    pub driver: Option<String>,

    /// Give the nodes in /dev/vfio to this user, by name or number
    ///
    /// So the user can run a guest with the device. By iommufd that takes /dev/iommu as well, which
    /// is shared by all and is not given away here.
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,

    /// Bind them again at every boot
    ///
    /// By a rule of udev's for each, which holds while this very kind of device is at the address.
    /// `unbind` and `restore` remove it. udev runs this very program as root, so it must be where only
    /// root can write, such as /usr/local/bin.
    #[arg(long)]
    pub persist: bool,

    /// Bind what is bound at every boot, and is not yet
    ///
    /// It is what busway-devices.service does, when udev has obeyed the rules: a device that could not be bound
    /// then is tried again, and named where it still cannot.
    #[arg(long, conflicts_with_all = ["addresses", "driver", "user", "persist", "from_rule"])]
    pub persisted: bool,

    /// Print what would be done, as commands, and do nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,

    /// A rule of udev's asks for it
    #[arg(long, hide = true)]
    pub from_rule: bool,

    /// What is done in spite of what stands against it.
    #[command(flatten)]
    pub permits: BindPermits,
}

/// `busway device unbind`
#[derive(Args, Clone, Debug)]
pub struct UnbindArgs {
    /// The devices: 0000:01:00.0, 01:00.0, 10de:1b81, wlp3s0, nvme0n1, or files of sysfs
    #[arg(value_name = "DEVICE", required = true)]
    pub addresses: Vec<Called>,

    /// Print what would be done, as commands, and do nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,

    /// What is done in spite of what stands against it.
    #[command(flatten)]
    pub permits: UnbindPermits,
}

/// `busway device restore`
#[derive(Args, Clone, Debug)]
#[command(group(ArgGroup::new("which").required(true)))]
pub struct RestoreArgs {
    /// The devices: 0000:01:00.0, 01:00.0, 10de:1b81, wlp3s0, nvme0n1, or files of sysfs
    #[arg(value_name = "DEVICE", group = "which")]
    pub addresses: Vec<Called>,

    /// Every device that Busway has moved
    #[arg(long, group = "which")]
    pub all: bool,

    /// Print what would be done, as commands, and do nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,

    /// What is done in spite of what stands against it.
    #[command(flatten)]
    pub permits: UnbindPermits,
}

fn vfio_driver(name: &str) -> Result<String, String> {
    match is_vfio_driver(name) {
        true => Ok(name.to_owned()),
        false => Err(format!(
            "`{name}` is no VFIO driver: these are vfio-pci and its variants, such as mlx5_vfio_pci"
        )),
    }
}

/// Changes the host below `root`, and keeps what is to be said of each step.
pub(in crate::cli) struct Changes<'a> {
    root: &'a SysRoot,
    kernel: &'a mut dyn Kernel,
    dry: bool,
    said: String,
}

impl<'a> Changes<'a> {
    pub(in crate::cli) fn new(root: &'a SysRoot, kernel: &'a mut dyn Kernel, dry: bool) -> Self {
        Self {
            root,
            kernel,
            dry,
            said: String::new(),
        }
    }

    /// Has `change` done. What is to be said of it comes first in what [`said`](Self::said) returns.
    pub(in crate::cli) fn make<T>(&mut self, change: impl FnOnce(&mut Session<'_>) -> T) -> T {
        let Self {
            root,
            kernel,
            dry,
            said,
        } = self;
        let mut tell = |step: &Step| {
            log::info!("{step}");
            match step {
                _ if *dry => *said += &format!("{}\n", step.command(root)),
                Step::Load { module } if is_vfio_driver(module) => {
                    *said += &format!("loaded the module {module}\n");
                }
                _ => {}
            }
        };
        let mut session = Session::new(root, *kernel, &mut tell)
            .stop_when(&busway_host::interrupted)
            .dry_run(*dry);
        change(&mut session)
    }

    /// What was said of the steps, and then of each device; of what would be done, only the steps.
    pub(in crate::cli) fn said<T>(self, devices: &[T], line: fn(&T) -> String) -> String {
        match self.dry {
            true => self.said,
            false => self.said + &devices.iter().map(line).collect::<String>(),
        }
    }
}

/// What a change says, and then why it failed, if it did.
pub(super) type Said = (String, Result<(), DeviceCommandError>);

pub(super) fn bind(args: &BindArgs, root: &SysRoot, kernel: &mut dyn Kernel) -> Said {
    if args.persisted {
        return bind_persisted(args.dry_run, root, kernel);
    }
    let addresses = match find(root, &args.addresses) {
        Ok(addresses) => addresses,
        Err(error) => return (String::new(), Err(error.into())),
    };
    let options = match options(args, root) {
        Ok(options) => options,
        Err(error) => return (String::new(), Err(error)),
    };
    let mut changes = Changes::new(root, kernel, args.dry_run);
    match changes.make(|session| busway_host::bind(session, &addresses, &options)) {
        Ok(bound) => (changes.said(&bound, bound_line), Ok(())),
        Err(error) => (changes.said(&[], bound_line), Err(error.into())),
    }
}

fn bind_persisted(dry_run: bool, root: &SysRoot, kernel: &mut dyn Kernel) -> Said {
    let mut changes = Changes::new(root, kernel, dry_run);
    match changes.make(busway_host::bind_persisted) {
        Ok(done) if done.is_empty() => {
            let said = "no device is bound at boot: busway device bind --persist DEVICE\n";
            (said.to_owned(), Ok(()))
        }
        Ok(done) => (changes.said(&done, at_boot_line), Ok(())),
        Err(error) => (changes.said(&error.done, at_boot_line), Err(error.into())),
    }
}

fn at_boot_line(one: &AtBoot) -> String {
    match one {
        AtBoot::Bound(bound) => bound_line(bound),
        AtBoot::Absent(address) => format!("{address}: there is no device\n"),
        AtBoot::Another(address) => {
            format!("{address}: another kind of device is there, and stays with the host\n")
        }
    }
}

fn options(args: &BindArgs, root: &SysRoot) -> Result<BindOptions, DeviceCommandError> {
    let user = args.user.as_ref();
    let user = user.map(|name| busway_host::user_id(root, name));
    let persist = match args.persist {
        true => {
            let program = std::env::current_exe().map_err(DeviceCommandError::OwnPath)?;
            Some(Persist { program })
        }
        false => None,
    };
    Ok(BindOptions {
        driver: args.driver.clone(),
        permits: args.permits.all(),
        user: user.transpose()?,
        persist,
        from_rule: args.from_rule,
    })
}

pub(super) fn unbind(args: &UnbindArgs, root: &SysRoot, kernel: &mut dyn Kernel) -> Said {
    let addresses = match find(root, &args.addresses) {
        Ok(addresses) => addresses,
        Err(error) => return (String::new(), Err(error.into())),
    };
    let permits = args.permits.all();
    let mut changes = Changes::new(root, kernel, args.dry_run);
    match changes.make(|session| busway_host::unbind(session, &addresses, &permits)) {
        Ok(unbound) => (changes.said(&unbound, unbound_line), Ok(())),
        Err(error) => {
            let unbound = match &error {
                UnbindError::Steps { unbound, .. } => unbound.as_slice(),
                _ => &[],
            };
            (changes.said(unbound, unbound_line), Err(error.into()))
        }
    }
}

pub(super) fn restore(args: &RestoreArgs, root: &SysRoot, kernel: &mut dyn Kernel) -> Said {
    let addresses = match find(root, &args.addresses) {
        Ok(addresses) => addresses,
        Err(error) => return (String::new(), Err(error.into())),
    };
    let permits = args.permits.all();
    let mut changes = Changes::new(root, kernel, args.dry_run);
    match changes.make(|session| busway_host::restore(session, &addresses, &permits)) {
        Ok(restored) if restored.is_empty() => (
            "nothing to restore: Busway has moved no device\n".to_owned(),
            Ok(()),
        ),
        Ok(restored) => (changes.said(&restored, restored_line), Ok(())),
        Err(error) => {
            let restored = match &error {
                RestoreError::Steps { restored, .. } => restored.as_slice(),
                _ => &[],
            };
            (changes.said(restored, restored_line), Err(error.into()))
        }
    }
}

fn bound_line(bound: &Bound) -> String {
    let Bound {
        address,
        group,
        driver,
        former,
        already,
        persists,
    } = bound;
    let from = match former {
        _ if *already => "already with".to_owned(),
        Some(former) => format!("taken from {former}, now with"),
        None => "now with".to_owned(),
    };
    let boot = if *persists { ", at every boot too" } else { "" };
    format!("{address}: {from} {driver}, IOMMU group {group}{boot}\n")
}

/// What follows where a device is not bound at boot any more.
fn no_more(persisted: bool) -> &'static str {
    if persisted { "; at boot too" } else { "" }
}

fn unbound_line(unbound: &Unbound) -> String {
    let Unbound {
        address,
        former,
        driver,
        persisted,
    } = unbound;
    let now = match (former, driver) {
        (Some(former), Some(driver)) => format!("taken from {former}, now with {driver}"),
        (Some(former), None) => {
            format!("taken from {former}; no driver of the host takes it")
        }
        (None, Some(driver)) => format!("with {driver}; VFIO does not have it"),
        (None, None) => "with no driver, and none of the host takes it".to_owned(),
    };
    format!("{address}: {now}{}\n", no_more(*persisted))
}

fn restored_line(restored: &Restored) -> String {
    let Restored {
        address,
        outcome,
        persisted,
    } = restored;
    let with = |driver: &Option<String>| match driver {
        Some(driver) => format!("with {driver}"),
        None => "with no driver".to_owned(),
    };
    let now = match outcome {
        Outcome::AsBefore {
            driver,
            driver_override,
        } => {
            let reserved = driver_override.as_ref();
            let reserved =
                reserved.map_or_else(String::new, |name| format!(", reserved for {name}"));
            format!("as before, {}{reserved}", with(driver))
        }
        Outcome::LeftToHost { driver } => format!("left to the host, {}", with(driver)),
        Outcome::NotWithheld => {
            "the host's drivers may have new virtual functions of it again, as before".to_owned()
        }
        Outcome::Gone => "it is not there any more; forgotten".to_owned(),
        Outcome::Another => "another device is there now, and was left alone; forgotten".to_owned(),
        Outcome::NotRecorded => format!(
            "Busway has not moved it since the host booted, and left it alone\n  \
             give it to the host's own driver: busway device unbind {address}"
        ),
    };
    format!("{address}: {now}{}\n", no_more(*persisted))
}
