use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::fake::{FakeOwner, FakeRoutes};

struct Fixture {
    routes: Arc<FakeRoutes>,
    owner: FakeOwner,
    msi: Msi,
}

impl Fixture {
    fn new(vectors: u8, address_64: bool, masking: bool) -> Self {
        let routes = Arc::new(FakeRoutes::default());
        let features = MsiFeatures {
            vectors,
            address_64,
            masking,
        };
        Self {
            msi: Msi::new(features, routes.clone()),
            owner: FakeOwner::default(),
            routes,
        }
    }

    fn write(&mut self, offset: u16, value: u32) {
        self.msi
            .write(offset, &value.to_le_bytes(), &mut self.owner);
    }

    fn control(&mut self, control: u16) {
        self.msi.write(2, &control.to_le_bytes(), &mut self.owner);
    }

    fn read(&self, offset: u16) -> u32 {
        let mut data = [0xee; 4];
        self.msi.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn arrived(&self) -> Vec<(u64, u32)> {
        let arrived = self.routes.arrived();
        arrived.iter().map(|m| (m.address, m.data)).collect()
    }
}

#[test]
fn all_vectors_that_the_guest_gave_are_connected_in_one_call() {
    let mut f = Fixture::new(8, true, false);
    f.write(4, 0xfee0_1000);
    f.write(8, 1);
    f.write(0xc, 0x43);
    f.control(2 << 4);
    assert_eq!(f.msi.connected(), 0);
    f.control(2 << 4 | 1);
    assert_eq!(f.owner.connects, [(0, 4)]);
    f.msi.trigger(0);
    f.msi.trigger(3);
    f.msi.trigger(4);
    assert_eq!(
        f.arrived(),
        [0x40, 0x43, 0x40].map(|data| (0x1_fee0_1000, data))
    );
    f.control(2 << 4);
    assert_eq!((f.owner.disconnects, f.msi.connected()), (1, 0));
    f.msi.trigger(0);
    assert_eq!(f.arrived().len(), 3);
}

#[test]
fn a_guest_that_gives_more_vectors_than_asked_for_gets_what_was_asked_for() {
    let mut f = Fixture::new(2, false, false);
    f.control(7 << 4 | 1);
    assert_eq!(f.owner.connects, [(0, 2)]);
}

#[test]
fn a_new_number_of_vectors_connects_them_anew() {
    let mut f = Fixture::new(4, false, false);
    f.control(1);
    f.control(1 | 2 << 4);
    assert_eq!(f.owner.connects, [(0, 1), (0, 4)]);
    assert_eq!(f.owner.disconnects, 1);
}

#[test]
fn the_message_moves_with_one_update_a_vector() {
    let mut f = Fixture::new(2, false, false);
    f.control(1 | 1 << 4);
    f.write(4, 0xfee0_2000);
    f.write(4, 0xfee0_2000);
    assert_eq!(f.routes.updates(), 2);
    f.msi.trigger(1);
    assert_eq!(f.arrived(), [(0xfee0_2000, 1)]);
}

#[test]
fn a_masked_vector_moves_with_one_update_when_its_mask_goes() {
    let mut f = Fixture::new(2, true, true);
    f.control(1 | 1 << 4);
    f.write(0x10, 0b10);
    f.msi.trigger(1);
    f.write(4, 0xfee0_3000);
    f.write(8, 1);
    f.write(0xc, 0x50);
    assert_eq!(f.routes.updates(), 3, "of the one that is not masked");
    f.write(0x10, 0);
    assert_eq!(f.routes.updates(), 4);
    assert_eq!(f.arrived(), [(0x1_fee0_3000, 0x51)]);
}

#[test]
fn a_masked_vector_is_held_back_and_shown_as_pending() {
    let mut f = Fixture::new(2, true, true);
    f.write(0x10, 0xffff_fffe);
    assert_eq!(f.read(0x10), 0b10, "there are masks for two vectors");
    f.control(1 | 1 << 4);
    f.msi.trigger(1);
    f.msi.trigger(1);
    assert_eq!((f.read(0x14), f.arrived().len()), (0b10, 0));
    f.write(0x10, 0);
    assert_eq!((f.read(0x14), f.arrived().len()), (0, 1));
}

#[test]
fn what_could_not_be_connected_is_kept_and_tried_again() {
    let mut f = Fixture::new(1, true, true);
    f.owner.refuses = true;
    f.control(1);
    f.msi.trigger(0);
    assert_eq!((f.msi.connected(), f.read(0x14)), (0, 1));
    f.owner.refuses = false;
    f.write(0x10, 0);
    assert_eq!((f.msi.connected(), f.arrived().len()), (1, 1));
}

#[test]
fn each_layout_has_its_registers_where_the_specification_has_them() {
    for (address_64, masking, size, data) in [
        (false, false, 0x0a, 0x08),
        (true, false, 0x0e, 0x0c),
        (false, true, 0x14, 0x08),
        (true, true, 0x18, 0x0c),
    ] {
        let mut f = Fixture::new(4, address_64, masking);
        assert_eq!(f.msi.capability_size(), size);
        assert_eq!(f.msi.capability_body().len(), usize::from(size) - 2);
        f.write(data, 0x1234);
        assert_eq!(f.read(data) & 0xffff, 0x1234);
        f.write(4, u32::MAX);
        assert_eq!(f.read(4), 0xffff_fffc);
        let control = (f.read(0) >> 16) as u16;
        assert_eq!(f.read(0) & 0xffff, 0xeeee, "not its bytes");
        assert_eq!(
            MsiFeatures::from_control(control),
            MsiFeatures {
                vectors: 4,
                address_64,
                masking
            }
        );
    }
}

proptest! {
    #[test]
    fn no_access_of_any_offset_and_width_panics_and_connections_follow_the_enable_bit(
        log2 in 0..=5u32,
        address_64: bool,
        masking: bool,
        accesses in vec((0..40u16, vec(any::<u8>(), 0..9), any::<u8>()), 0..60),
    ) {
        let mut f = Fixture::new(1 << log2, address_64, masking);
        for (offset, mut data, vector) in accesses {
            f.msi.write(offset, &data, &mut f.owner);
            f.msi.read(offset, &mut data);
            f.msi.trigger(vector);
            let control = f.read(0) >> 16;
            let given = ((control >> 4) & 7).min(log2);
            let connected = if control & 1 != 0 { 1 << given } else { 0 };
            prop_assert_eq!(f.msi.connected(), connected);
        }
        f.msi.reset(&mut f.owner);
        prop_assert_eq!(f.msi.connected(), 0);
        prop_assert_eq!(f.owner.connects.len(), f.owner.disconnects);
    }
}

/// What a guest or a device does.
#[derive(Clone, Debug)]
enum Step {
    Control { enabled: bool, given: u16 },
    Address(u32),
    Data(u16),
    Mask(u32),
    Trigger(u8),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    vec(
        prop_oneof![
            3 => (any::<bool>(), 0..4u16)
                .prop_map(|(enabled, given)| Step::Control { enabled, given }),
            3 => any::<u32>().prop_map(Step::Address),
            3 => any::<u16>().prop_map(Step::Data),
            6 => any::<u32>().prop_map(Step::Mask),
            8 => (0..8u8).prop_map(Step::Trigger),
            1 => Just(Step::Reset),
        ],
        0..80,
    )
}

/// MSI of four vectors as the specification tells it: no routes, only a message and masks.
#[derive(Default)]
struct Model {
    enabled: bool,
    given: u16,
    address: u32,
    data: u16,
    mask: u32,
    pending: u32,
    arrived: Vec<(u64, u32)>,
}

impl Model {
    fn count(&self) -> u8 {
        1 << self.given.min(2)
    }

    fn step(&mut self, step: &Step) {
        let before = (self.enabled, self.count());
        match *step {
            Step::Control { enabled, given } => (self.enabled, self.given) = (enabled, given),
            Step::Address(address) => self.address = address & !3,
            Step::Data(data) => self.data = data,
            Step::Mask(mask) => self.mask = mask & 0xf,
            Step::Trigger(vector) if self.enabled => {
                let vector = if vector < self.count() { vector } else { 0 };
                self.pending |= 1 << vector;
            }
            Step::Trigger(_) => {}
            Step::Reset => {
                let arrived = std::mem::take(&mut self.arrived);
                *self = Self {
                    arrived,
                    ..Self::default()
                };
            }
        }
        if before != (self.enabled, self.count()) {
            self.pending = 0;
        }
        for vector in 0..self.count() {
            if self.enabled && self.pending & !self.mask & 1 << vector != 0 {
                self.pending &= !(1 << vector);
                let low = u16::from(self.count() - 1);
                let data = (self.data & !low) | u16::from(vector);
                self.arrived.push((self.address.into(), data.into()));
            }
        }
    }
}

proptest! {
    /// None lost while masked, none doubled, none to an old message, and the pending bits say which
    /// are held back.
    #[test]
    fn every_interrupt_arrives_as_the_specification_has_it(steps in steps()) {
        let mut f = Fixture::new(4, false, true);
        let mut model = Model::default();
        for step in &steps {
            match *step {
                Step::Control { enabled, given } => f.control(given << 4 | u16::from(enabled)),
                Step::Address(address) => f.write(4, address),
                Step::Data(data) => f.write(8, data.into()),
                Step::Mask(mask) => f.write(0xc, mask),
                Step::Trigger(vector) => f.msi.trigger(vector),
                Step::Reset => f.msi.reset(&mut f.owner),
            }
            model.step(step);
            prop_assert_eq!(f.arrived(), model.arrived.clone());
            prop_assert_eq!(f.read(0x10), model.pending);
            prop_assert_eq!(f.read(0xc), model.mask);
        }
    }
}
