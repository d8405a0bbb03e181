//! The host's pools of huge pages.

use std::path::Path;

use super::lock::LockError;
use super::root::{self, SysRoot};
use super::session::Session;
use super::steps::{Step, StepError};

/// The huge pages of one size, on one NUMA node or on all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// The node; none: all of the host.
    pub node: Option<u32>,
    /// The size of one, in bytes.
    pub size: u64,
    /// How many there are.
    pub total: u64,
    /// How many of them nobody uses.
    pub free: u64,
    /// How many of them go when they are free: what a shrunk pool still has in use.
    pub surplus: u64,
}

/// What came of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// How many pages there were to be.
    pub asked: u64,
    /// What there is now.
    pub now: HugePages,
}

/// Huge pages were not reserved, and nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum HugePagesRefusal {
    /// this host has no NUMA node {0}
    #[error("this host has no NUMA node {0}\n  see those there are: busway hugepages")]
    NoNode(u32),
    /// NUMA node {0} has no memory
    #[error(
        "NUMA node {0} has processors and no memory\n  see those that have some: busway hugepages"
    )]
    NoMemory(u32),
    /// this host has no huge pages of {0} bytes
    #[error(
        "this host has no huge pages of that size ({0} bytes)\n  see those there are: busway hugepages"
    )]
    NoSize(u64),
    /// {amount} bytes are no whole number of huge pages of {size} bytes
    #[error("{amount} bytes are no whole number of huge pages of {size} bytes")]
    NotWhole {
        /// What was asked for.
        amount: u64,
        /// One of them.
        size: u64,
    },
}

/// Huge pages are not as asked.
#[derive(Debug, thiserror::Error)]
pub enum HugePagesError {
    /// They cannot be as asked. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] HugePagesRefusal),
    /// Somebody else is changing devices. Nothing was changed.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A pool of huge pages could not be changed.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// Every pool of the host, by node and size.
#[must_use]
pub fn huge_pages(root: &SysRoot) -> Vec<HugePages> {
    let pools: Vec<_> = nodes(root)
        .into_iter()
        .flat_map(|node| pools(root, Some(node)))
        .collect();
    match pools.is_empty() {
        // A kernel without NUMA.
        true => self::pools(root, None),
        false => pools,
    }
}

/// The NUMA nodes, by number.
pub(super) fn nodes(root: &SysRoot) -> Vec<u32> {
    let names = root::names(&root.sys.join("devices/system/node"));
    let number = |name: &String| name.strip_prefix("node")?.parse().ok();
    let mut nodes: Vec<u32> = names.iter().filter_map(number).collect();
    nodes.sort_unstable();
    nodes
}

fn pools(root: &SysRoot, node: Option<u32>) -> Vec<HugePages> {
    let names = root::names(&root::huge_page_pools(root, node));
    let size = |name: &String| {
        let size = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
        size.parse::<u64>().ok()?.checked_mul(1024)
    };
    let mut sizes: Vec<_> = names.iter().filter_map(size).collect();
    sizes.sort_unstable();
    sizes
        .into_iter()
        .filter_map(|size| pool(root, node, size))
        .collect()
}

fn pool(root: &SysRoot, node: Option<u32>, size: u64) -> Option<HugePages> {
    let folder = root::huge_page_pool(root, node, size);
    let number = |name: &str| root::number(&folder.join(name));
    Some(HugePages {
        node,
        size,
        total: number("nr_hugepages")?,
        free: number("free_hugepages")?,
        surplus: number("surplus_hugepages").unwrap_or(0),
    })
}

/// Has there be `amount` bytes in huge pages of `size` bytes, on one node, or spread over all. The
/// kernel gives as many as it finds; where that is too few, it is asked to make room, and once more.
///
/// # Errors
///
/// Where there is no such pool, or it cannot be written. Too few pages are no error here.
pub fn reserve_huge_pages(
    session: &mut Session<'_>,
    node: Option<u32>,
    size: u64,
    amount: u64,
) -> Result<Reserved, HugePagesError> {
    if let Some(node) = node {
        let known = root::huge_page_pools(session.root, Some(node));
        // The kernel makes the folder of pools only where there is memory (mm/hugetlb_sysfs.c).
        let has_node = known.parent().is_some_and(Path::exists);
        match known.exists() {
            true => {}
            false if has_node => return Err(HugePagesRefusal::NoMemory(node).into()),
            false => return Err(HugePagesRefusal::NoNode(node).into()),
        }
    }
    let find = |root: &SysRoot| pool(root, node, size).ok_or(HugePagesRefusal::NoSize(size));
    find(session.root)?;
    if !amount.is_multiple_of(size) {
        return Err(HugePagesRefusal::NotWhole { amount, size }.into());
    }
    let asked = amount / size;
    let _lock = session.lock()?;
    let ask = Step::HugePages {
        node,
        size,
        count: asked,
    };
    session.take(ask.clone())?;
    let mut now = find(session.root)?;
    if now.total < asked && !session.is_dry() {
        let compacted = session.take(Step::Compact);
        // A kernel without compaction has nothing better to offer.
        if compacted.is_ok() {
            session.take(ask)?;
            now = find(session.root)?;
        }
    }
    Ok(Reserved { asked, now })
}
