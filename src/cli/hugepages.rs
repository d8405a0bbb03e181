//! `busway hugepages`: the host's pools of huge pages, shown and filled.

use std::io::{self, Write};

use busway_host::{HugePages, HugePagesError, Kernel, LinuxKernel, Reserved, SysRoot, huge_pages};
use clap::Args;

use super::device::{Changes, aligned};
use super::value::Value;
use crate::exit::{HOST, RUNTIME, USAGE};

/// `busway hugepages`
#[derive(Args, Clone, Debug)]
pub struct HugepagesArgs {
    /// Have this much memory be in huge pages: 8G; without it, show what there is
    ///
    /// It is what there is to be, not what is added; 0 gives all that are free back.
    #[arg(value_name = "AMOUNT", value_parser = size)]
    pub amount: Option<u64>,

    /// The size of one: 2M, 1G; without it, the kernel's default
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "amount")]
    pub size: Option<u64>,

    /// On this NUMA node; without it, spread over all
    #[arg(long, value_name = "NODE", requires = "amount")]
    pub node: Option<u32>,

    /// Print what would be done, as commands, and do nothing
    #[arg(short = 'n', long, requires = "amount")]
    pub dry_run: bool,
}

fn size(text: &str) -> Result<u64, String> {
    Value::Text(text.to_owned())
        .size()
        .map_err(|error| error.to_string())
}

/// Why `busway hugepages` failed.
#[derive(Debug, thiserror::Error)]
pub enum HugepagesError {
    /// They were not reserved.
    #[error(transparent)]
    Reserve(#[from] HugePagesError),
    /// Fewer could be had than were asked for.
    #[error("{}", short(.0))]
    Short(Reserved),
    /// cannot write the result: {0}
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

impl HugepagesError {
    /// The status to exit with, of [`crate::exit`].
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Reserve(HugePagesError::Refused(_)) => USAGE,
            Self::Short(_) => HOST,
            Self::Reserve(_) | Self::Output(_) => RUNTIME,
        }
    }
}

/// Runs `busway hugepages` on this host.
///
/// # Errors
///
/// [`HugepagesError`], whose [`exit_status`](HugepagesError::exit_status) says what to exit with.
pub fn run(args: &HugepagesArgs) -> Result<(), HugepagesError> {
    let mut out = io::stdout().lock();
    run_on(args, &SysRoot::default(), &mut LinuxKernel, &mut out)
}

/// Runs `busway hugepages` on the host below `root`.
///
/// # Errors
///
/// As [`run`].
pub fn run_on(
    args: &HugepagesArgs,
    root: &SysRoot,
    kernel: &mut dyn Kernel,
    out: &mut dyn Write,
) -> Result<(), HugepagesError> {
    let (said, result) = match args.amount {
        None => (table(&huge_pages(root)), Ok(())),
        Some(amount) => {
            let size = args.size.unwrap_or_else(|| default_size(root));
            let mut changes = Changes::new(root, kernel, args.dry_run);
            let reserve = |session: &mut busway_host::Session<'_>| {
                busway_host::reserve_huge_pages(session, args.node, size, amount)
            };
            let reserved = changes.make(reserve)?;
            let enough = args.dry_run || reserved.now.total >= reserved.asked;
            let result = match enough {
                true => Ok(()),
                false => Err(HugepagesError::Short(reserved)),
            };
            (changes.said(&[reserved], line), result)
        }
    };
    match out.write_all(said.as_bytes()).and_then(|()| out.flush()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => result,
        Err(error) => Err(error.into()),
        Ok(()) => result,
    }
}

/// What the kernel takes where nobody says a size.
fn default_size(root: &SysRoot) -> u64 {
    let text = std::fs::read_to_string(root.proc.join("meminfo")).unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Hugepagesize:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    let kib: Option<u64> = number.and_then(|number| number.parse().ok());
    kib.and_then(|kib| kib.checked_mul(1024)).unwrap_or(2 << 20)
}

fn table(pools: &[HugePages]) -> String {
    if pools.is_empty() {
        return "this kernel has no huge pages (CONFIG_HUGETLBFS)\n".to_owned();
    }
    let mut rows = vec![["NODE", "SIZE", "PAGES", "FREE", "MEMORY"].map(str::to_owned)];
    rows.extend(pools.iter().map(|pool| {
        [
            pool.node
                .map_or_else(|| "all".to_owned(), |node| node.to_string()),
            amount(pool.size),
            pool.total.to_string(),
            pool.free.to_string(),
            amount(pool.total.saturating_mul(pool.size)),
        ]
    }));
    aligned(&rows)
}

fn line(reserved: &Reserved) -> String {
    let Reserved { asked, now } = reserved;
    let memory = amount(now.total.saturating_mul(now.size));
    let mut text = format!(
        "{}: {} huge pages of {} ({memory}), {} free\n",
        place(now),
        now.total,
        amount(now.size),
        now.free,
    );
    if now.total > *asked {
        let more = now.total - asked;
        text += &format!("  {more} more than asked for are in use, and go when they are free\n");
    }
    text
}

fn place(pool: &HugePages) -> String {
    match pool.node {
        Some(node) => format!("node {node}"),
        None => "all nodes".to_owned(),
    }
}

fn short(reserved: &Reserved) -> String {
    let Reserved { asked, now } = reserved;
    let letter = |size: u64| match size {
        size if size.is_multiple_of(1 << 30) => format!("{}G", size >> 30),
        size if size.is_multiple_of(1 << 20) => format!("{}M", size >> 20),
        size => format!("{}K", size >> 10),
    };
    let size = letter(now.size);
    let (count, since) = match now.node {
        Some(node) => (
            format!("{node}:{asked}"),
            " (for one node, since Linux 5.16)",
        ),
        None => (asked.to_string(), ""),
    };
    format!(
        "only {} of {asked} huge pages of {} are to be had on {}: the free memory is too little, or in \
         pieces too small\n  \
         free some and try again, or have them reserved at boot by the kernel's parameters{since}: \
         hugepagesz={size} hugepages={count}",
        now.total,
        amount(now.size),
        place(now),
    )
}

/// Bytes in the greatest unit that leaves no fraction.
fn amount(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let whole = units
        .into_iter()
        .find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    match whole {
        Some((unit, shift)) => format!("{} {unit}", bytes >> shift),
        None => bytes.to_string(),
    }
}
