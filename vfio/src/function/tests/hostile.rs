//! Hostile devices and guests.

use std::sync::{Arc, Mutex};

use busway_pci::{BarIndex, PciFunction, capabilities, extended_capabilities, spec};
use proptest::prelude::*;

use super::{read, wiring};
use crate::fake::{FakeDevice, FakeRoutes};
use crate::{Area, AssignOptions, AssignedFunction, DeviceRegion, IrqIndex, IrqInfo, Placement};

#[derive(Clone, Debug)]
enum Step {
    Config(u16, Vec<u8>),
    Bar(u8, u64, Vec<u8>),
    Reset,
    Settle,
}

fn access() -> impl Strategy<Value = Vec<u8>> {
    let width = prop::sample::select(vec![1_usize, 2, 3, 4, 8]);
    width.prop_flat_map(|width| prop::collection::vec(any::<u8>(), width))
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let offset = prop_oneof![0_u16..0x200, any::<u16>()];
    let place = prop_oneof![0_u64..0x5000, any::<u64>()];
    prop::collection::vec(
        prop_oneof![
            8 => (offset, access()).prop_map(|(at, data)| Step::Config(at, data)),
            8 => (0_u8..7, place, access()).prop_map(|(bar, at, data)| Step::Bar(bar, at, data)),
            1 => Just(Step::Reset),
            2 => Just(Step::Settle),
        ],
        0..60,
    )
}

/// A configuration space of noise, in which lists hold together here and there.
fn hostile() -> impl Strategy<Value = FakeDevice> {
    let noise = prop_oneof![
        Just(vec![0xff; 4096]),
        Just(vec![0; 4096]),
        prop::collection::vec(any::<u8>(), 4096),
    ];
    let pointer = || prop_oneof![0x40_u8..0xff, Just(0)];
    let id = prop::sample::select(vec![
        0x01_u8, 0x05, 0x09, 0x10, 0x11, 0x13, 0x14, 0x00, 0xff,
    ]);
    let standard = prop::collection::vec((pointer(), id, pointer()), 0..20);
    let link = || prop_oneof![0x100_u16..0xfff, Just(0)];
    let extended = prop::collection::vec((link(), 0_u16..0x30, link()), 0..20);
    let size = prop_oneof![
        3 => Just(0_u64),
        4 => (4_u32..14).prop_map(|log2| 1 << log2),
        1 => (14_u32..64).prop_map(|log2| 1 << log2),
        1 => any::<u64>(),
    ];
    let bars = prop::collection::vec((size, prop::sample::select(vec![0_u8, 1, 4, 8, 12])), 6);
    let interrupts = (0_u32..70, 0_u32..40, any::<bool>(), 0_u32..70);
    let rom = prop::sample::select(vec![0_usize, 512, 2048, 3000, 1 << 16]);
    let first = (pointer(), any::<bool>(), rom);
    (noise, standard, extended, bars, interrupts, first).prop_map(
        |(noise, standard, extended, bars, (msix, msi, resizable, most), (first, tame, rom))| {
            let mut fake = FakeDevice {
                config: Mutex::new(noise),
                rom: vec![0xa5; rom],
                most_vectors: most,
                msix: IrqInfo {
                    count: msix,
                    resizable,
                },
                msi: IrqInfo {
                    count: msi,
                    resizable: false,
                },
                ..FakeDevice::default()
            };
            fake.intx.count = msix % 2;
            if tame {
                fake.set_config(0x3d, &[first % 6]);
                fake.set_config(0, &[0x86, 0x80]);
                fake.set_config(6, &[0x10]);
                fake.set_config(0x0e, &[0]);
                fake.set_config(0x34, &[first]);
            }
            for (at, id, next) in standard {
                fake.set_config(usize::from(at & !3), &[id, next]);
            }
            for (at, id, next) in extended {
                let header = u32::from(id) | 1 << 16 | u32::from(next) << 20;
                fake.set_config(usize::from(at & !3), &header.to_le_bytes());
            }
            for (number, (size, flags)) in bars.into_iter().enumerate() {
                fake.bars[number] = DeviceRegion {
                    size,
                    readable: true,
                    writable: true,
                    areas: vec![Area { offset: 0, size }],
                };
                fake.set_config(0x10 + number * 4, &[flags]);
            }
            fake
        },
    )
}

proptest! {
    /// Whatever a device says and a guest does, and wherever the guest has it: nothing panics, both lists of the guest's
    /// end, none of what the table hides is in them, no vector is connected that is not enabled, and on bus 0 nothing
    /// tells of a link.
    #[test]
    fn a_hostile_device_and_a_hostile_guest_harm_nothing(
        fake in hostile(),
        steps in steps(),
        on_bus_0 in any::<bool>(),
    ) {
        let fake = Arc::new(fake);
        let routes = Arc::new(FakeRoutes::default());
        let placement = if on_bus_0 { Placement::RootBus } else { Placement::BehindPort };
        let made = AssignedFunction::new(
            "fake", fake.clone(), wiring(routes, placement), &AssignOptions::default()
        );
        if let Ok(function) = made {
            for step in steps {
                match step {
                    Step::Config(at, mut data) => {
                        function.config_write(at, &data);
                        function.config_read(at, &mut data);
                    }
                    Step::Bar(bar, at, mut data) => {
                        let bar = if bar == 6 { BarIndex::Rom } else { BarIndex::Bar(bar) };
                        function.bar_write(bar, at, &data);
                        function.bar_read(bar, at, &mut data);
                    }
                    Step::Reset => function.reset(),
                    Step::Settle => {
                        function.run_deferred();
                    }
                }
                for region in function.decoded() {
                    prop_assert!(function.bars().contains(&region));
                }
                prop_assert_eq!(read(&function, 0x30) & 0x7fe, 0);
                let connected = function.summary().pin.is_some_and(|(_, connected)| connected);
                prop_assert_eq!(connected, fake.kind() == Some(IrqIndex::Intx));
                let messages = function.lock().uses_messages();
                prop_assert_eq!(connected, function.summary().pin.is_some() && !messages);
            }
            function.reset();
            let config = |offset| read(&function, offset);
            for found in extended_capabilities(&config) {
                prop_assert!(found.id == 0 || !matches!(
                    crate::policy::find(crate::policy::EXTENDED, found.id).map(|rule| rule.keep),
                    Some(crate::policy::Keep::No(_))
                ), "{:?}", found);
            }
            prop_assert!(capabilities(&config).len() <= 48);
            if on_bus_0 {
                let first = capabilities(&config).into_iter().find(|one| one.id == spec::CAP_PCI_EXPRESS);
                if let Some(express) = first {
                    prop_assert_eq!(config(express.offset) >> 20 & 0xf, 0b1001);
                }
                let mut extended = extended_capabilities(&config).into_iter();
                prop_assert!(!extended.any(|one| crate::policy::OF_A_LINK.contains(&one.id)));
            }
            drop(function);
            prop_assert_eq!(fake.kind(), None);
        }
    }
}
