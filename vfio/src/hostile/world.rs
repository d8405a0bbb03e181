//! What the stories share: how bytes become choices, the device, and its wiring.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use busway_pci::pace::StoppedClock;
use busway_pci::{InterruptRoute, InterruptRoutes, MsiMessage, PciFunction, RouteError, spec};

use crate::fake::{FakeDevice, FakeLines, eventfd};
use crate::{Area, AssignOptions, AssignedFunction, DeviceRegion, IrqInfo, Placement, Wiring};

/// Bytes as choices; zeroes when they are used up.
#[derive(Debug)]
pub(super) struct Story<'a>(&'a [u8]);

impl<'a> Story<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let (now, rest) = self.0.split_at(self.0.len().min(N));
        self.0 = rest;
        let mut array = [0; N];
        array[..now.len()].copy_from_slice(now);
        array
    }

    pub(super) fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    pub(super) fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(super) fn dword(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(super) fn quadword(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A power of two, one less, or anything at all.
    pub(super) fn size(&mut self) -> u64 {
        match self.byte() {
            shift @ 0..64 => 1 << shift,
            shift @ 64..96 => (1 << (shift - 64)) - 1,
            96 => u64::MAX,
            _ => self.quadword(),
        }
    }

    /// An access's width.
    pub(super) fn width(&mut self) -> usize {
        1 << (self.byte() & 3)
    }
}

const RECORDED: [&str; 4] = [
    include_str!("../../testdata/nvme.txt"),
    include_str!("../../testdata/e1000e.txt"),
    include_str!("../../testdata/igb.txt"),
    include_str!("../../testdata/igbvf.txt"),
];

/// A recorded device, or an empty one, with as many changes as the story has.
pub(super) fn device(story: &mut Story<'_>) -> FakeDevice {
    let mut fake = match RECORDED.get(usize::from(story.byte() % 5)) {
        Some(text) => FakeDevice::recorded(text),
        None => blank(),
    };
    for _ in 0..story.byte() % 24 {
        deface(story, &fake);
    }
    for bar in 0..6 {
        match story.byte() {
            0..64 => {}
            64..96 => fake.bars[bar] = DeviceRegion::default(),
            96..176 => fake.set_bar(bar, story.size()),
            _ => {
                let size = story.size();
                fake.set_bar(bar, size);
                let area = |story: &mut Story<'_>| Area {
                    offset: story.size(),
                    size: story.size(),
                };
                fake.bars[bar].areas = (0..story.byte() % 4).map(|_| area(story)).collect();
            }
        }
    }
    let info = |story: &mut Story<'_>| match story.byte() {
        0 => IrqInfo::default(),
        byte => IrqInfo {
            count: 1 << (byte % 12),
            resizable: byte & 0x80 != 0,
        },
    };
    fake.msi = info(story);
    fake.msix = info(story);
    fake.most_vectors = match story.byte() {
        few @ 0..32 => few.into(),
        _ => u32::MAX,
    };
    fake.can_reset = story.byte() & 1 == 0;
    fake
}

/// An endpoint with one BAR and, at 0x40, MSI-X whose table and pending bits are in it.
pub(super) fn blank() -> FakeDevice {
    let mut fake = FakeDevice::default();
    fake.set_config(0, &[0x34, 0x12, 0x78, 0x56]);
    fake.set_config(6, &[0x10]);
    fake.set_config(0x34, &[0x40]);
    fake.set_config(0x40, &[0x11, 0, 7, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
    fake.set_bar(0, 0x4000);
    let vectors = IrqInfo {
        count: 2048,
        resizable: true,
    };
    (fake.msix, fake.msi) = (vectors, vectors);
    fake
}

/// Changes a few bytes of the device's configuration space, with a liking for what is a list.
pub(super) fn deface(story: &mut Story<'_>, fake: &FakeDevice) {
    let kind = story.byte();
    let at = usize::from(story.word()) % (spec::CONFIG_SPACE_SIZE as usize - 16);
    let dword = |value: u32| value.to_le_bytes();
    match kind % 8 {
        0 => fake.set_config(at, &[story.byte()]),
        1 => fake.set_config(at, &dword(story.dword())),
        2 => fake.set_config(at, &[0xff; 16]),
        // A capability, and where the list goes on.
        3 => fake.set_config((at % 256) & 0xfc, &[story.byte(), story.byte()]),
        4 => fake.set_config(0x34, &[story.byte()]),
        5 => {
            let header = u32::from(story.byte()) | 1 << 16 | u32::from(story.word()) << 20;
            fake.set_config(at & !3, &dword(header));
        }
        6 => {
            let body = story.array::<12>();
            fake.set_config((0x40 + at % 160) & !3, &body);
        }
        _ => fake.set_config((0x10 + at % 24) & !3, &dword(story.dword() & 0xf)),
    }
}

/// Routes that go nowhere, of which there is no end until somebody says so.
#[derive(Debug)]
pub(super) struct Routes {
    event: Arc<OwnedFd>,
    pub(super) exhausted: AtomicBool,
}

impl Routes {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            event: eventfd().shared(),
            exhausted: AtomicBool::new(false),
        })
    }
}

#[derive(Debug)]
struct Route {
    event: Arc<OwnedFd>,
    masked: Mutex<bool>,
}

impl InterruptRoutes for Routes {
    fn connect(&self, _: u16, _message: MsiMessage) -> Result<Arc<dyn InterruptRoute>, RouteError> {
        if self.exhausted.load(Ordering::Relaxed) {
            return Err(RouteError::Exhausted { limit: 0 });
        }
        Ok(Arc::new(Route {
            event: self.event.clone(),
            masked: Mutex::new(false),
        }))
    }
}

impl InterruptRoute for Route {
    fn update(&self, _message: MsiMessage) -> Result<(), RouteError> {
        Ok(())
    }

    fn set_masked(&self, masked: bool) -> Result<(), RouteError> {
        let mut now = self.masked.lock().unwrap();
        assert_ne!(*now, masked, "a mask is set that was set");
        *now = masked;
        Ok(())
    }

    fn pending(&self) -> bool {
        *self.masked.lock().unwrap()
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn trigger(&self) {}
}

/// The function that is made of a device, if one is.
pub(super) fn assign(
    fake: &Arc<FakeDevice>,
    routes: &Arc<Routes>,
) -> Option<Arc<AssignedFunction>> {
    let wiring = Wiring {
        routes: routes.clone(),
        lines: Arc::new(FakeLines::default()),
        resets: Arc::default(),
        clock: Arc::new(StoppedClock::default()),
        placement: Placement::default(),
    };
    AssignedFunction::new("fake", fake.clone(), wiring, &AssignOptions::default()).ok()
}

/// A doubleword of what the guest sees.
pub(super) fn seen(function: &dyn PciFunction, offset: u16) -> u32 {
    let mut data = [0; 4];
    function.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

/// A write that stays within its doubleword, as the topology sees to it.
pub(super) fn write(function: &dyn PciFunction, offset: u16, data: &[u8]) {
    let room = 4 - usize::from(offset % 4);
    function.config_write(offset, &data[..data.len().min(room)]);
}
