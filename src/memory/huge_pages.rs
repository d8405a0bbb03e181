//! Huge pages for the guest's RAM: which size, and whether the host has enough of them.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::RamError;
use crate::config::MemoryConfig;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The pools of huge pages, a folder for each size.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// The size of the huge pages to use, once it is known that enough of them are free.
pub(super) fn reserved_huge_pages(config: &MemoryConfig) -> Result<u64, RamError> {
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
    let page = match config.hugepage_size {
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
    if !config.size.is_multiple_of(page) {
        return Err(RamError::NotWholeHugePages {
            size: config.size,
            page,
        });
    }
    let (pool, needed) = (Pool::of(page), config.size / page);
    match pool.room() {
        room if room < needed => Err(pool.too_few(needed, room)),
        _ => Ok(page),
    }
}

/// The huge pages of a size that this host has, or would make.
/// Linux, Documentation/admin-guide/mm/hugetlbpage.rst
pub(super) struct Pool {
    folder: PathBuf,
    page: u64,
}

impl Pool {
    pub(super) fn of(page: u64) -> Self {
        Self {
            folder: Path::new(POOLS).join(format!("hugepages-{}kB", page / KIB)),
            page,
        }
    }

    fn read(&self, name: &str) -> u64 {
        let text = fs::read_to_string(self.folder.join(name));
        text.ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Free, and promised to nobody else's mapping.
    pub(super) fn free(&self) -> u64 {
        self.read("free_hugepages")
            .saturating_sub(self.read("resv_hugepages"))
    }

    /// How many a mapping can have: those that are free, and as many as the kernel may still make.
    fn room(&self) -> u64 {
        let surplus = self.read("surplus_hugepages");
        let more = self.read("nr_overcommit_hugepages").saturating_sub(surplus);
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

fn default_huge_page() -> Option<u64> {
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
