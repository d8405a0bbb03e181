use std::fs;

use proptest::collection::vec;
use proptest::prelude::*;

use busway_pci::Reserve;
use busway_vfio::AssignOptions;

use super::*;
use crate::config::MemoryConfig;
use crate::machine::passthrough::placement::HostIdentity;
use crate::memory::Ram;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The doorbell of MSIs, and what AMD's IOMMUs keep below 1 TiB for HyperTransport.
const AMD: [(u64, u64); 2] = [(0xfee0_0000, 0xfeef_ffff), (0xfd_0000_0000, 0xff_ffff_ffff)];

// linux/ioport.h: memory, 64-bit, prefetchable.
const MEMORY: u64 = 0x200;
const WIDE: u64 = 0x10_0000;
const PREFETCH: u64 = 0x2000;

/// A host's devices: the number of the bus, and size and flags of BARs by their number.
struct Devices(tempfile::TempDir, Vec<PlannedFunction>);

impl Devices {
    fn new(devices: &[&[(usize, u64, u64)]]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let functions = (1..)
            .zip(devices)
            .map(|(bus, bars)| {
                let folder = root.path().join(format!("0000:{bus:02x}:00.0"));
                fs::create_dir(&folder).unwrap();
                let mut lines = vec!["0x0 0x0 0x0".to_owned(); 7];
                for &(number, size, flags) in *bars {
                    let start = 1_u64 << 44;
                    lines[number] = format!("{start:#x} {:#x} {flags:#x}", start + (size - 1));
                }
                fs::write(folder.join("resource"), lines.join("\n")).unwrap();
                PlannedFunction::new(
                    &HostIdentity::in_folder(&folder),
                    &AssignOptions::default(),
                    Reserve::SMALL,
                )
            })
            .collect();
        Self(root, functions)
    }

    fn plan(
        &self,
        memory: u64,
        reserved: &[(u64, u64)],
        bits: u8,
    ) -> Result<AddressPlan, NoRoomError> {
        AddressPlan::new(
            &to_plan(&with(memory)),
            &self.1,
            reserved.to_vec(),
            bits,
            false,
            PluggedRoom::default(),
            1,
        )
    }
}

/// The same RAM without zones.
fn to_plan(memory: &MemoryConfig) -> MemoryToPlan {
    MemoryToPlan::new(memory, &[])
}

/// Room for all BARs of `devices`, but for ports.
fn find_all(devices: &Devices, windows: &Windows) -> Result<(), NoRoom<Option<usize>>> {
    let kinds = [WindowKind::Memory32, WindowKind::Memory64];
    let mut kinds = kinds.into_iter();
    kinds.try_for_each(|kind| find_room(&needs(&devices.1), kind, windows))
}

fn with(size: u64) -> MemoryConfig {
    MemoryConfig {
        size,
        ..MemoryConfig::default()
    }
}

fn refused(result: Result<AddressPlan, NoRoomError>) -> String {
    result.unwrap_err().to_string()
}

/// The BARs of an AMD VCK5000: 64-bit, and not prefetchable.
const VCK5000: &[(usize, u64, u64)] = &[
    (0, 512 * MIB, MEMORY | WIDE),
    (2, 64 * MIB, MEMORY | WIDE),
    (4, 2 * MIB, MEMORY | WIDE),
];

#[test]
fn a_guest_without_large_bars_below_4_gib_has_its_window_at_3_gib() {
    let gpu: &[_] = &[
        (0, 16 * MIB, MEMORY),
        (1, 32 * GIB, MEMORY | WIDE | PREFETCH),
        (3, 32 * MIB, MEMORY | WIDE | PREFETCH),
        (6, MIB / 2, MEMORY),
    ];
    for devices in [vec![], vec![gpu; 8]] {
        let plan = Devices::new(&devices).plan(16 * GIB, &[], 46).unwrap();
        assert_eq!(plan.mmio32_start, 3 * GIB);
        let windows = plan.windows(&[0..3 * GIB, 4 * GIB..17 * GIB], &[]);
        let (memory32, memory64) = (3 * GIB..layout::MMIO32_END, 17 * GIB..1 << 46);
        assert_eq!(windows.memory32, [memory32]);
        assert_eq!(windows.memory64, [memory64]);
    }
}

#[test]
fn ram_makes_room_below_4_gib_for_cards_whose_large_bars_are_not_prefetchable() {
    for (cards, start) in [(1, 2 * GIB), (2, GIB)] {
        let devices = Devices::new(&vec![VCK5000; cards]);
        let plan = devices.plan(8 * GIB, &[], 46).unwrap();
        assert_eq!(plan.mmio32_start, start);
    }
    assert_eq!(
        refused(Devices::new(&[VCK5000; 3]).plan(8 * GIB, &[], 46)),
        "BAR 0 of 0000:03:00.0 (512 MiB, 64-bit, not prefetchable) finds no room in the guest: \
         behind a PCIe port a BAR that is not prefetchable is below 4 GiB, where a guest has 2560 \
         MiB at most for all its PCI devices; give the VM fewer of these devices: most is needed by \
         0000:01:00.0 (578 MiB), 0000:02:00.0 (578 MiB), 0000:03:00.0 (578 MiB)"
    );
}

#[test]
fn on_bus_0_a_64_bit_bar_is_above_ram_whether_it_is_prefetchable_or_not() {
    let on_bus_0 = |mut devices: Devices| {
        let all = devices.1.into_iter();
        devices.1 = all.map(|one| one.on_root_bus(true)).collect();
        devices
    };
    // More than a guest can have behind ports.
    let cards = on_bus_0(Devices::new(&[VCK5000; 8]));
    let plan = cards.plan(8 * GIB, &[], 46).unwrap();
    assert_eq!(plan.mmio32_start, layout::MMIO32_START);
    let ram = layout::ram_ranges(8 * GIB, plan.mmio32_start, &[]);
    assert_eq!(find_all(&cards, &plan.windows(&ram, &[])), Ok(()));
    let large: &[_] = &[(2, 128 * GIB, MEMORY | WIDE)];
    let text = refused(on_bus_0(Devices::new(&[large; 2])).plan(GIB, &[], 38));
    assert!(text.starts_with("BAR 2 of 0000:02:00.0 "), "{text}");
    assert!(text.ends_with("; give the VM fewer such devices"), "{text}");
}

#[test]
fn what_has_room_on_bus_0_alone_is_said_to_belong_there() {
    let text = refused(Devices::new(&[&[(2, 4 * GIB, MEMORY | WIDE)]]).plan(GIB, &[], 46));
    assert!(
        text.ends_with("; have it on bus 0: root_port=off beside its --device"),
        "{text}"
    );
}

#[test]
fn a_bar_that_no_guest_has_room_for_is_said_to_be_one() {
    let text = refused(Devices::new(&[&[(2, 2 * GIB, MEMORY)]]).plan(GIB, &[], 46));
    assert!(text.starts_with("BAR 2 of 0000:01:00.0 (2 GiB, "), "{text}");
    assert!(text.ends_with("; no guest can have this device"), "{text}");
    let rom: &[_] = &[(0, 2 * GIB, MEMORY), (6, GIB, MEMORY)];
    let text = refused(Devices::new(&[rom]).plan(GIB, &[], 46));
    assert!(text.contains("a 32-bit BAR is below 4 GiB"), "{text}");
    let roms: Vec<_> = vec![&[(6, GIB, MEMORY)][..]; 3];
    let text = refused(Devices::new(&roms).plan(GIB, &[], 46));
    assert!(
        text.contains("the expansion ROM of 0000:03:00.0 (1 GiB) finds no room"),
        "{text}"
    );
    assert!(text.ends_with("rom=off beside its --device"), "{text}");
}

#[test]
fn four_bars_of_128_gib_beside_512_gib_of_ram_go_round_what_amds_iommu_reserves() {
    let bar: &[_] = &[(0, 128 * GIB, MEMORY | WIDE | PREFETCH)];
    let devices = Devices::new(&[bar; 4]);
    let plan = devices.plan(512 * GIB, &AMD, 48).unwrap();
    let holes = layout::holes(AMD, 2 * MIB);
    let ram = layout::ram_ranges(512 * GIB, plan.mmio32_start, &holes);
    let windows = plan.windows(&ram, &[]);
    assert_eq!(
        windows.memory64,
        [513 * GIB..1012 * GIB, 1024 * GIB..1 << 48]
    );
    assert_eq!(find_all(&devices, &windows), Ok(()));
    // With 40 bits there is nothing above the hole.
    let text = refused(devices.plan(512 * GIB, &AMD, 40));
    assert_eq!(
        text,
        "BAR 0 of 0000:03:00.0 (128 GiB, 64-bit, prefetchable) finds no room in the guest: it is \
         above the guest's RAM, and the host's processors address 1024 GiB (40 bits), of which the \
         host's IOMMU keeps 12 GiB clear; it fits beside 383 GiB of RAM (--memory size=383G)"
    );
}

#[test]
fn a_refusal_above_ram_names_what_helps() {
    let bar: &[_] = &[(2, 128 * GIB, MEMORY | WIDE | PREFETCH)];
    let two = Devices::new(&[bar; 2]);
    let text = refused(two.plan(GIB, &[], 38));
    assert!(text.starts_with("BAR 2 of 0000:02:00.0 "), "{text}");
    assert!(text.ends_with("; give the VM fewer such devices"), "{text}");
    let one = Devices::new(&[bar]);
    let folder = one.1[0].host.folder.clone();
    fs::write(folder.join("resource2_resize"), "0x3f00\n").unwrap();
    let text = refused(one.plan(GIB, &[], 37));
    assert!(
        text.contains("; no guest of this host can have this device; or make the BAR smaller"),
        "{text}"
    );
    assert!(
        text.contains("0000:01:00.0/resource2_resize lists"),
        "{text}"
    );
}

#[test]
fn ram_that_can_be_plugged_lies_between_ram_and_the_window_and_is_refused_where_it_finds_no_place()
{
    use crate::config::HotplugMethod;
    let memory = |size: u64, pluggable: u64| MemoryConfig {
        hotplug_size: Some(pluggable),
        hotplug_method: HotplugMethod::VirtioMem,
        ..with(size)
    };
    let plan = |memory: &MemoryConfig, devices: &Devices| {
        AddressPlan::new(
            &to_plan(memory),
            &devices.1,
            AMD.to_vec(),
            42,
            false,
            PluggedRoom::default(),
            1,
        )
    };
    let none = Devices::new(&[]);
    for (size, pluggable, expected) in [
        (GIB, GIB, 4 * GIB..5 * GIB),
        (4 * GIB, 8 * GIB, 6 * GIB..14 * GIB),
        // Round what the IOMMU reserves, and in one piece.
        (4 * GIB, 1010 * GIB, 1024 * GIB..2034 * GIB),
    ] {
        let memory = memory(size, pluggable);
        let plan = plan(&memory, &none).unwrap();
        assert_eq!(
            plan.pluggable(&to_plan(&memory)),
            Ok(vec![expected.clone()])
        );
        let windows = plan.windows(&[0..GIB, expected.clone()], &[]);
        assert!(
            windows
                .memory64
                .iter()
                .all(|part| part.start >= expected.end)
        );
        let same = Ram::around(&memory, &[], false, plan.mmio32_start, &plan.reserved).unwrap();
        assert_eq!(same.pluggable_ranges(), [expected]);
    }
    let fixed = with(GIB);
    let nothing = plan(&fixed, &none).unwrap().pluggable(&to_plan(&fixed));
    assert_eq!(nothing, Ok(Vec::new()));
    let large = memory(GIB, 4096 * GIB);
    let place = plan(&large, &none).unwrap().pluggable(&to_plan(&large));
    assert!(
        matches!(place, Err(PluggableError::Place { bits: 42, .. })),
        "{place:?}"
    );
    // A card's BAR finds no room above it.
    let card = Devices::new(&[&[(0, 2048 * GIB, MEMORY | WIDE | PREFETCH)]]);
    plan(&memory(GIB, GIB), &card).unwrap();
    let why = refused(plan(&memory(GIB, 2048 * GIB), &card));
    assert!(why.contains("hotplug_size="), "{why}");
}

#[test]
fn what_lies_between_the_ranges_that_the_kernel_maps_is_kept_clear_as_well() {
    let plan = Devices::new(&[]).plan(GIB, &[], 40).unwrap();
    let usable = [
        (0, 0xfedf_ffff),
        (0xfef0_0000, 0x1f_ffff_ffff),
        (0x30_0000_0000, 0x7f_ffff_ffff),
    ];
    let usable = usable.map(|(start, last)| IovaRange { start, last });
    let ram = 0..GIB;
    let windows = plan.windows(std::slice::from_ref(&ram), &usable);
    // Beyond what the IOMMU reaches a BAR is reached by processors alone, which is no reason against it.
    assert_eq!(
        windows.memory64,
        [4 * GIB..0x20_0000_0000, 0x30_0000_0000..1 << 40]
    );
}

#[test]
fn a_mediated_device_whose_bars_nobody_tells_has_the_room_of_an_empty_slot() {
    let folder = "/sys/bus/mdev/devices/bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
    let host = HostIdentity::in_folder(folder.as_ref());
    let reserve = Reserve {
        memory32: 32 * MIB,
        memory64: 4 * GIB,
    };
    let mediated = PlannedFunction::new(&host, &AssignOptions::default(), reserve);
    assert_eq!(mediated.host.name(), folder.rsplit('/').next().unwrap());
    assert_eq!(mediated.bars, PlannedFunction::empty_slot(reserve, 0).bars);
}

#[test]
fn nonsense_in_sysfs_is_no_bar() {
    let devices = Devices::new(&[&[(0, 12345, MEMORY), (1, 1 << 63, MEMORY | WIDE | PREFETCH)]]);
    assert_eq!(devices.1[0].bars.len(), 1);
    assert!(devices.plan(GIB, &[], 52).is_err());
    let missing = PlannedFunction::new(
        &HostIdentity::in_folder("/nowhere/x".as_ref()),
        &AssignOptions::default(),
        Reserve::SMALL,
    );
    assert!(missing.bars.is_empty());
    assert!(devices.0.path().exists());
}

proptest! {
    /// Whatever devices and reserved ranges there are: a plan has room for every BAR, and its windows
    /// are clear of RAM and of what is reserved.
    #[test]
    fn a_plan_has_room_for_every_bar_clear_of_ram_and_of_what_is_reserved(
        bars in vec((12_u32..40, any::<bool>(), any::<bool>()), 0..6),
        memory in 1_u64..600,
        reserved in vec((0_u64..1 << 41, 0_u64..1 << 36), 0..4),
    ) {
        let bars: Vec<Vec<_>> = bars
            .into_iter()
            .map(|(log2, wide, prefetch)| {
                let flags = MEMORY | if wide { WIDE } else { 0 } | if prefetch { PREFETCH } else { 0 };
                let log2 = if wide && prefetch { log2 } else { log2.min(30) };
                vec![(0, 1 << log2, flags)]
            })
            .collect();
        let slices: Vec<_> = bars.iter().map(Vec::as_slice).collect();
        let devices = Devices::new(&slices);
        let mut reserved: Vec<_> =
            reserved.into_iter().map(|(start, size)| (start, start + size)).collect();
        reserved.sort_unstable();
        if let Ok(plan) = devices.plan(memory * GIB, &reserved, 46) {
            let holes = layout::holes(reserved.iter().copied(), 2 * MIB);
            let ram = layout::ram_ranges(memory * GIB, plan.mmio32_start, &holes);
            let windows = plan.windows(&ram, &[]);
            prop_assert_eq!(find_all(&devices, &windows), Ok(()));
            for window in [&windows.memory32[..], &windows.memory64[..]].concat() {
                let clear = |other: &Range<u64>| {
                    window.end <= other.start || other.end <= window.start
                };
                prop_assert!(holes.iter().chain(&ram).all(clear));
            }
        }
    }
}
