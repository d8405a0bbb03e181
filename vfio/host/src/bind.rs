//! Giving devices to VFIO: all of those asked for, or none.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use busway_iommu::is_vfio_driver;
use busway_pci::Bdf;

use super::check::{self, check_bind, check_unbind};
use super::device::{HostDevice, HostError};
use super::host::Host;
use super::identity::HardwareIds;
use super::journal::{Journal, JournalError, Record};
use super::kernel::Readers;
use super::lock::{BOOT, LockError, PATIENCE};
use super::modules::Aliases;
use super::permit::{Permit, Permits};
use super::persist::{self, Persist, PersistError};
use super::put_back::{Stranded, put_back};
use super::refusal::{RefusedError, refuse_if};
use super::session::Session;
use super::steps::StepError;
use super::{user, variant};

/// How devices are bound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BindOptions {
    /// The driver, where it is not to be the one that the kernel has for the device.
    pub driver: Option<String>,
    /// What is done in spite of what stands against it.
    pub permits: Permits,
    /// Whom the devices' nodes are given to.
    pub user: Option<u32>,
    /// Whether they are bound again at each boot.
    pub persist: Option<Persist>,
    /// Whether a rule of udev's asks for it, which comes to each device of a group by itself, and
    /// has reserved it already.
    pub from_rule: bool,
}

/// A device that VFIO has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The device.
    pub address: Bdf,
    /// Its IOMMU group.
    pub group: u32,
    /// The VFIO driver that has it.
    pub driver: String,
    /// The driver that it was taken from.
    pub former: Option<String>,
    /// Whether VFIO had it before.
    pub already: bool,
    /// Whether it will be bound again at each boot.
    pub persists: bool,
}

/// Devices were not bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Something stands against it. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] RefusedError),
    /// Somebody else is changing devices. Nothing was changed.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// What devices had before cannot be read. Nothing was changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Devices cannot be bound at each boot by this program. Nothing was changed.
    #[error(transparent)]
    Persist(#[from] PersistError),
    /// A step failed, and what had been done was undone, but for `stranded`.
    #[error("{source}{}", LeftOver(.stranded))]
    Undone {
        /// The step.
        source: StepError,
        /// Devices that could not be given back.
        stranded: Vec<Stranded>,
    },
}

/// What was not undone.
struct LeftOver<'a>(&'a [Stranded]);

impl fmt::Display for LeftOver<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("\n  every device has the driver that it had before");
        }
        for stranded in self.0 {
            write!(f, "\n{stranded}")?;
        }
        f.write_str("\n  what it had is recorded: try again with `busway device restore --all`")
    }
}

/// A device and what is to become of it.
struct Plan<'a> {
    device: &'a HostDevice,
    /// The module of the driver.
    module: String,
    driver: String,
    /// Whether the driver has it already.
    already: bool,
    /// What it had before.
    record: Record,
    /// The nodes of it that are given away now, and who had them.
    given: BTreeMap<PathBuf, u32>,
    /// The rule that it had.
    rule: Option<String>,
}

/// Binds the devices at `addresses` to VFIO drivers through `driver_override`.
///
/// # Errors
///
/// Where something stands against it, with nothing changed; or where a step failed, with every
/// device given back what it had.
pub fn bind(
    session: &mut Session<'_>,
    addresses: &[Bdf],
    options: &BindOptions,
) -> Result<Vec<Bound>, BindError> {
    let addresses: BTreeSet<_> = addresses.iter().copied().collect();
    // Before waiting for anybody, and for those who may not change anything.
    let mut options = options.clone();
    let spelled = |name: &String| variant::driver_of(session.root, name);
    options.driver = options.driver.as_ref().map(spelled);
    let options = &options;
    unhindered(session, &addresses, options)?;
    if let Some(persist) = &options.persist {
        persist.check(session.kernel)?;
    }
    // At boot many wait for each other.
    let patience = if options.from_rule { BOOT } else { PATIENCE };
    let _lock = session.lock_within(patience)?;
    let host = unhindered(session, &addresses, options)?;
    for &address in &addresses {
        for warning in check::warnings(&host, address) {
            log::warn!("{address}: {warning}");
        }
    }
    let former = Journal::read(session.root)?;
    let aliases = Aliases::read(session.root);

    let devices = addresses.iter().filter_map(|&address| host.device(address));
    let mut plans: Vec<_> = devices
        .map(|device| plan(session, &aliases, &former, device, options))
        .collect();
    let mut journal = former.clone();
    match bind_all(session, &mut journal, &mut plans, options) {
        Ok(()) => Ok(plans.iter().map(|plan| bound(plan, options)).collect()),
        Err(source) => Err(undo(session, &former, journal, &plans, source)),
    }
}

/// The host as it is, unless something stands against binding the devices.
///
/// udev opens the nodes of a device that is new, to see what is on a disk. That is no use of the
/// device, and soon over: what stands against it is looked at again when udev is done.
fn unhindered(
    session: &mut Session<'_>,
    addresses: &BTreeSet<Bdf>,
    options: &BindOptions,
) -> Result<Host, BindError> {
    let host = Host::read(session.root)?;
    let refused = match refuse(&host, addresses, options) {
        Ok(()) => return Ok(host),
        Err(refused) => refused,
    };
    // A rule runs while udev is busy, with itself.
    if options.from_rule {
        return Err(refused.into());
    }
    session.kernel.wait_for_udev();
    let host = Host::read(session.root)?;
    refuse(&host, addresses, options)?;
    Ok(host)
}

fn refuse(
    host: &Host,
    addresses: &BTreeSet<Bdf>,
    options: &BindOptions,
) -> Result<(), RefusedError> {
    let mut permits = options.permits.clone();
    if options.from_rule {
        permits.insert(Permit::Group);
    }
    let mut refusals = check_bind(host, addresses, &permits);
    // One that changes from one VFIO driver to another must not be in a guest.
    let changes = |address: &&Bdf| {
        let now = host
            .device(**address)
            .and_then(|device| device.driver.clone());
        let now = now.filter(|now| is_vfio_driver(now));
        now.is_some_and(|now| options.driver.as_ref().is_some_and(|driver| *driver != now))
    };
    let changing = addresses.iter().filter(changes).copied().collect();
    refusals.extend(check_unbind(host, &changing, &options.permits));
    refuse_if(refusals)
}

fn plan<'a>(
    session: &Session<'_>,
    aliases: &Aliases,
    journal: &Journal,
    device: &'a HostDevice,
    options: &BindOptions,
) -> Plan<'a> {
    let address = device.address;
    let now = device.driver.clone().filter(|now| is_vfio_driver(now));
    let asked = options.driver.clone();
    let already = now.filter(|now| asked.as_ref().is_none_or(|asked| asked == now));
    let module = match already.as_ref().or(asked.as_ref()) {
        Some(driver) => driver.clone(),
        None => variant::module_for(session.root, aliases, address),
    };
    let driver = already.clone();
    let driver = driver.unwrap_or_else(|| variant::driver_of(session.root, &module));
    // What the journal says holds while the device is where it was taken: an earlier change that was
    // killed, or one that stands. Else somebody has put it back since.
    let record = journal.get(address).filter(|record| {
        let reserved = device.driver_override.as_ref() == Some(&record.taken_for);
        record.identity == HardwareIds::of(device) && (device.is_with_vfio() || reserved)
    });
    let record = record.cloned().unwrap_or_else(|| Record {
        identity: HardwareIds::of(device),
        driver: device.driver.clone(),
        driver_override: device.driver_override.clone(),
        taken_for: driver.clone(),
        nodes: BTreeMap::new(),
    });
    Plan {
        device,
        module,
        driver,
        already: already.is_some(),
        record,
        given: BTreeMap::new(),
        rule: persist::rule_text(session.root, address),
    }
}

fn bind_all(
    session: &mut Session<'_>,
    journal: &mut Journal,
    plans: &mut [Plan<'_>],
    options: &BindOptions,
) -> Result<(), StepError> {
    let mut modules = BTreeSet::new();
    for plan in plans.iter_mut().filter(|plan| !plan.already) {
        if !session.root.driver(&plan.driver).exists() && modules.insert(plan.module.clone()) {
            session.load(&plan.module)?;
        }
        // Now that it is loaded, it says its name.
        plan.driver = variant::driver_of(session.root, &plan.module);
        plan.record.taken_for.clone_from(&plan.driver);
    }

    // What a rule does is undone by giving the device to the host's own driver, which it had when the
    // rule was made: at boot it may have none yet.
    let recorded =
        |plan: &&Plan<'_>| !options.from_rule && (!plan.already || options.persist.is_some());
    for plan in plans.iter().filter(recorded) {
        journal.insert(plan.device.address, plan.record.clone());
    }
    journal.save(session)?;
    for Plan { device, driver, .. } in plans.iter().filter(|plan| !plan.already) {
        session.set_override(device.address, Some(driver))?;
        session.detach(device.address)?;
        session.attach(device.address, driver)?;
    }

    if let Some(user) = options.user {
        give(session, journal, plans, user, options.from_rule)?;
    }
    if let Some(persist) = &options.persist {
        for Plan { device, driver, .. } in plans.iter() {
            let identity = HardwareIds::of(device);
            let path = persist::rule(session.root, device.address);
            let text = persist::text(persist, device.address, identity, driver, options.user)
                .map_err(Box::new)?;
            session.file(&path, Some(&text), Readers::Everybody)?;
        }
    }
    Ok(())
}

/// Gives the devices' nodes to a user, and remembers who had them.
fn give(
    session: &mut Session<'_>,
    journal: &mut Journal,
    plans: &mut [Plan<'_>],
    user: u32,
    from_rule: bool,
) -> Result<(), StepError> {
    // A rule runs while udev is busy, with itself.
    if !from_rule && !session.is_dry() {
        session.kernel.wait_for_udev();
    }
    let mut given = BTreeSet::new();
    for plan in plans.iter_mut() {
        for node in user::nodes(session.root, plan.device) {
            match session.kernel.owner(&node) {
                Ok(now) if now == user => continue,
                Ok(now) => plan.given.insert(node.clone(), now),
                // It is there when the device is bound.
                Err(_) if session.is_dry() => None,
                Err(_) => continue,
            };
            given.insert(node);
        }
        if plan.given.is_empty() || from_rule {
            continue;
        }
        for (node, &former) in &plan.given {
            plan.record.nodes.entry(node.clone()).or_insert(former);
        }
        journal.insert(plan.device.address, plan.record.clone());
    }
    journal.save(session)?;
    given
        .into_iter()
        .try_for_each(|node| session.own(node, user))
}

/// Undoes what was done, and says what could not be.
fn undo(
    session: &mut Session<'_>,
    former: &Journal,
    mut journal: Journal,
    plans: &[Plan<'_>],
    source: StepError,
) -> BindError {
    session.undo();
    let mut stranded = Vec::new();
    let mut trouble = None;
    for plan in plans.iter().rev() {
        let address = plan.device.address;
        let rule = persist::rule(session.root, address);
        if persist::rule_text(session.root, address) != plan.rule {
            trouble = session
                .file(&rule, plan.rule.as_deref(), Readers::Everybody)
                .err()
                .or(trouble);
        }
        // What it had when this began, which need not be what the journal says of it.
        let before = Record {
            driver: plan.device.driver.clone(),
            driver_override: plan.device.driver_override.clone(),
            nodes: plan.given.clone(),
            ..plan.record.clone()
        };
        match put_back(session, address, &before) {
            Some(left) => stranded.push(left),
            None => journal.copy_from(former, address),
        }
    }
    trouble = journal.save(session).err().or(trouble);
    if let Some(error) = trouble {
        log::warn!("{error}");
    }
    BindError::Undone { source, stranded }
}

fn bound(plan: &Plan<'_>, options: &BindOptions) -> Bound {
    Bound {
        address: plan.device.address,
        group: plan.device.group.unwrap_or_default(),
        driver: plan.driver.clone(),
        former: plan.device.driver.clone().filter(|_| !plan.already),
        already: plan.already,
        persists: options.persist.is_some() || plan.rule.is_some(),
    }
}
