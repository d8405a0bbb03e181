//! Huge pages for the guest's RAM: which size, and whether the host has enough of them.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::RamError;
use crate::config::MemoryConfig;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The pools of huge pages, a folder for each size.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// The host's NUMA nodes, each with pools of its own.
const NODES: &str = "/sys/devices/system/node";

/// The size of the huge pages to use, once it is known that enough of them are free.
pub(super) fn reserved_huge_pages(config: &MemoryConfig) -> Result<u64, RamError> {
    let page = huge_page_size(config.hugepage_size)?;
    check_pool(page, [config.size])?;
    Ok(page)
}

/// The size of the huge pages to use where these were `asked` for, or nothing was said.
pub(super) fn huge_page_size(asked: Option<u64>) -> Result<u64, RamError> {
    let mut sizes: Vec<u64> = fs::read_dir(POOLS)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let kib = name
                .to_str()?
                .strip_prefix("hugepages-")?
                .strip_suffix("kB")?;
            kib.parse::<u64>().ok()?.checked_mul(KIB)
        })
        .collect();
    sizes.sort_unstable();
    let page = match asked {
        Some(page) => page,
        None => default_huge_page().unwrap_or(2 * MIB),
    };
    if !sizes.contains(&page) {
        let have: Vec<String> = sizes
            .iter()
            .map(|size| format!("{} KiB", size / KIB))
            .collect();
        return Err(RamError::NoSuchHugePage {
            size: page,
            have: if have.is_empty() {
                "none at all".to_owned()
            } else {
                have.join(" and ")
            },
        });
    }
    Ok(page)
}

/// That enough of these huge pages are free for memory of `sizes`, together.
pub(super) fn check_pool(page: u64, sizes: impl IntoIterator<Item = u64>) -> Result<(), RamError> {
    let mut needed = 0_u64;
    for size in sizes {
        if !size.is_multiple_of(page) {
            return Err(RamError::NotWholeHugePages { size, page });
        }
        needed = needed.saturating_add(size / page);
    }
    let pool = Pool::of(page);
    match pool.room() {
        room if room < needed => Err(pool.too_few(needed, room)),
        _ => Ok(()),
    }
}

/// The huge pages of a size that this host has, or would make.
/// Linux, Documentation/admin-guide/mm/hugetlbpage.rst
pub(super) struct Pool {
    folder: PathBuf,
    /// Where it is said how many more the kernel would make.
    of_all: PathBuf,
    page: u64,
}

impl Pool {
    pub(super) fn of(page: u64) -> Self {
        let folder = Path::new(POOLS).join(pool_name(page));
        Self {
            of_all: folder.clone(),
            folder,
            page,
        }
    }

    /// Those of one of the host's NUMA nodes.
    pub(super) fn of_node(page: u64, node: u32) -> Self {
        let pools = format!("{NODES}/node{node}/hugepages");
        Self {
            folder: Path::new(&pools).join(pool_name(page)),
            ..Self::of(page)
        }
    }

    fn read(&self, name: &str) -> u64 {
        read(&self.folder, name)
    }

    /// Free, and promised to nobody else's mapping.
    pub(super) fn free(&self) -> u64 {
        self.read("free_hugepages")
            .saturating_sub(self.read("resv_hugepages"))
    }

    /// How many a mapping can have: those that are free, and as many as the kernel may still make.
    pub(super) fn room(&self) -> u64 {
        let surplus = read(&self.of_all, "surplus_hugepages");
        let more = read(&self.of_all, "nr_overcommit_hugepages").saturating_sub(surplus);
        self.free().saturating_add(more)
    }

    /// That `needed` more cannot be had, but only `free`.
    pub(super) fn too_few(&self, needed: u64, free: u64) -> RamError {
        let taken = self.read("nr_hugepages").saturating_sub(self.free());
        RamError::TooFewHugePages {
            needed,
            free,
            page_kib: self.page / KIB,
            total: taken.saturating_add(needed),
            path: self.folder.join("nr_hugepages").display().to_string(),
        }
    }
}

fn pool_name(page: u64) -> String {
    format!("hugepages-{}kB", page / KIB)
}

/// A number in a pool's folder; 0 where there is none.
fn read(folder: &Path, name: &str) -> u64 {
    let text = fs::read_to_string(folder.join(name));
    text.ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// Bytes of a huge page where nothing else is said.
pub(crate) fn default_huge_page() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let rest = text
        .lines()
        .find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    rest.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(KIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_that_the_kernel_makes_on_demand_count_and_a_pool_that_lacks_is_told_how_many() {
        let folder = tempfile::tempdir().unwrap();
        let pool = Pool {
            folder: folder.path().to_owned(),
            of_all: folder.path().to_owned(),
            page: 2 * MIB,
        };
        let set = |files: &[(&str, u64)]| {
            for (name, value) in files {
                fs::write(folder.path().join(name), format!("{value}\n")).unwrap();
            }
        };
        assert_eq!(pool.room(), 0);
        set(&[("nr_overcommit_hugepages", 4096)]);
        assert_eq!(pool.room(), 4096);
        // 100, of which 96 are surplus; 40 are free, and 30 of these promised.
        set(&[("nr_hugepages", 100), ("surplus_hugepages", 96)]);
        set(&[("free_hugepages", 40), ("resv_hugepages", 30)]);
        assert_eq!(pool.room(), 10 + 4000);
        set(&[("nr_overcommit_hugepages", 0)]);
        assert_eq!(pool.room(), 10);
        let text = pool.too_few(256, pool.room()).to_string();
        assert!(
            text.starts_with("256 huge pages of 2048 KiB are needed and 10 are free")
                && text.contains("`echo 346 | sudo tee "),
            "{text}"
        );
    }
}
