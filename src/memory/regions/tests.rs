use super::*;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use vm_memory::GuestAddress;
use vm_memory::mmap::MmapRegionBuilder;

type Log = Arc<Mutex<Vec<String>>>;

struct Witness {
    name: &'static str,
    refuses: Option<&'static str>,
    log: Log,
}

impl RegionListener for Witness {
    fn name(&self) -> &str {
        self.name
    }

    fn added(&self, region: &Arc<Region>) -> Result<(), RegionError> {
        if self.refuses == Some(region.name()) {
            return Err("it is full".into());
        }
        let line = format!("{} +{}", self.name, region.name());
        self.log.lock().unwrap().push(line);
        Ok(())
    }

    fn removed(&self, region: &Arc<Region>) {
        let line = format!("{} -{}", self.name, region.name());
        self.log.lock().unwrap().push(line);
    }
}

fn region(name: &str, guest: u64, size: u64) -> Arc<Region> {
    // SAFETY: the listeners of these tests never touch the memory.
    Arc::new(unsafe { Region::device(name, guest, size, 0, ()) })
}

fn witness(name: &'static str, refuses: Option<&'static str>, log: &Log) -> Arc<Witness> {
    Arc::new(Witness {
        name,
        refuses,
        log: log.clone(),
    })
}

fn mapping(file: Option<&File>, flags: i32) -> Arc<GuestRegionMmap> {
    let mut builder = MmapRegionBuilder::new(0x1000)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags);
    if let Some(file) = file {
        builder = builder.with_file_offset(FileOffset::new(file.try_clone().unwrap(), 0x1000));
    }
    let region = builder.build().unwrap();
    Arc::new(GuestRegionMmap::new(region, GuestAddress(0x8000)).unwrap())
}

#[test]
fn a_region_says_which_part_of_a_file_it_is_where_others_can_map_that() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x2000).unwrap();
    let shared = Region::ram("ram", mapping(Some(&file), libc::MAP_SHARED));
    let at = shared.file().expect("a file");
    assert_eq!(at.start(), 0x1000);
    let numbers = |file: &File| {
        let metadata = file.metadata().unwrap();
        (metadata.dev(), metadata.ino())
    };
    assert_eq!(numbers(at.file()), numbers(&file));
    assert_eq!((shared.guest(), shared.size()), (0x8000, 0x1000));
    let copy = Region::rom("rom", mapping(Some(&file), libc::MAP_PRIVATE));
    assert!(copy.file().is_none());
    let anonymous = mapping(None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    assert!(Region::ram("ram", anonymous).file().is_none());
    assert!(region("bar", 0, 0x1000).file().is_none());
}

#[test]
fn rom_alone_is_read_only() {
    let anonymous = || mapping(None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let rom = Region::rom("rom", anonymous());
    assert_eq!((rom.kind(), rom.read_only()), (RegionKind::Rom, true));
    assert!(!Region::ram("ram", anonymous()).read_only());
    assert!(!region("bar", 0, 0x1000).read_only());
}

fn taken(log: &Log) -> Vec<String> {
    std::mem::take(&mut log.lock().unwrap())
}

#[test]
fn listeners_hear_of_a_region_in_order_and_of_its_going_in_reverse() {
    let (log, regions) = (Log::default(), Regions::default());
    let ram = region("ram", 0, 0x1000);
    regions.listen(witness("kvm", None, &log)).unwrap();
    regions.add(ram.clone()).unwrap();
    regions.listen(witness("dma", None, &log)).unwrap();
    assert_eq!(taken(&log), ["kvm +ram", "dma +ram"]);
    regions.remove(&ram);
    regions.remove(&ram);
    assert_eq!(taken(&log), ["dma -ram", "kvm -ram"]);
}

#[test]
fn a_refusal_leaves_everyone_as_before() {
    let (log, regions) = (Log::default(), Regions::default());
    regions.listen(witness("kvm", None, &log)).unwrap();
    regions.listen(witness("dma", Some("bar"), &log)).unwrap();
    let error = regions.add(region("bar", 0, 0x1000)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "bar at 0x0..=0xfff was refused by the dma: it is full"
    );
    assert_eq!(taken(&log), ["kvm +bar", "kvm -bar"]);
    regions.add(region("ram", 0, 0x1000)).unwrap();
}

#[test]
fn a_listener_that_cannot_take_what_is_there_keeps_nothing() {
    let (log, regions) = (Log::default(), Regions::default());
    regions.add(region("low", 0, 0x1000)).unwrap();
    regions.add(region("high", 0x1000, 0x1000)).unwrap();
    let error = regions.listen(witness("dma", Some("high"), &log));
    assert!(error.is_err());
    assert_eq!(taken(&log), ["dma +low", "dma -low"]);
    regions.clear();
    assert_eq!(taken(&log), [""; 0]);
}

#[test]
fn an_overlap_names_both() {
    let regions = Regions::default();
    regions.add(region("ram", 0x1000, 0x1000)).unwrap();
    let error = regions.add(region("bar", 0x1fff, 1)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "bar at 0x1fff..=0x1fff overlaps ram at 0x1000..=0x1fff"
    );
    regions.add(region("bar", 0x2000, 1)).unwrap();
}

#[test]
fn a_listener_that_is_forgotten_hears_that_all_goes_and_nothing_more() {
    let log = Log::default();
    let regions = Regions::default();
    let stays = witness("stays", None, &log);
    let leaves: Arc<dyn RegionListener> = witness("leaves", None, &log);
    regions.listen(stays).unwrap();
    regions.listen(leaves.clone()).unwrap();
    for (name, at) in [("a", 0), ("b", 0x1000)] {
        regions.add(region(name, at, 0x1000)).unwrap();
    }
    log.lock().unwrap().clear();
    regions.forget(&leaves);
    regions.forget(&leaves);
    regions.add(region("c", 0x2000, 0x1000)).unwrap();
    assert_eq!(*log.lock().unwrap(), ["leaves -b", "leaves -a", "stays +c"]);
}
