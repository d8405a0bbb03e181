use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::fake::{FakeOwner, FakeRoutes};

const ENABLE: u16 = spec::MSIX_CONTROL_ENABLE;
const MASK: u16 = spec::MSIX_CONTROL_MASK;

struct Fixture {
    routes: Arc<FakeRoutes>,
    owner: FakeOwner,
    msix: Msix,
}

impl Fixture {
    fn new(vectors: u16) -> Self {
        let routes = Arc::new(FakeRoutes::default());
        Self {
            msix: Msix::new(vectors, routes.clone()),
            owner: FakeOwner::default(),
            routes,
        }
    }

    fn control(&mut self, control: u16) {
        self.msix.write_control(control, &mut self.owner);
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.msix
            .table_write(offset, &value.to_le_bytes(), &mut self.owner);
    }

    fn message(&mut self, vector: u64, message: MsiMessage) {
        self.write(vector * 16, message.address as u32);
        self.write(vector * 16 + 4, (message.address >> 32) as u32);
        self.write(vector * 16 + 8, message.data);
    }

    fn mask(&mut self, vector: u64, masked: bool) {
        self.write(vector * 16 + 12, masked.into());
    }

    fn pba(&self) -> u64 {
        let mut data = [0; 8];
        self.msix.pba_read(0, &mut data);
        u64::from_le_bytes(data)
    }
}

fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_1000,
        data,
    }
}

#[test]
fn a_vector_costs_nothing_until_it_is_unmasked() {
    let mut f = Fixture::new(2048);
    f.control(ENABLE | MASK);
    f.message(7, message(7));
    f.control(ENABLE);
    assert_eq!((f.msix.connected(), f.owner.enables), (0, 1));
    f.mask(7, false);
    f.mask(2047, false);
    assert_eq!(f.owner.connects, [(7, 1), (2047, 1)]);
    assert_eq!(f.msix.connected(), 2);
    f.mask(7, true);
    f.mask(7, false);
    assert_eq!(
        f.owner.connects.len(),
        2,
        "unmasking again connects nothing"
    );
    f.control(0);
    assert_eq!((f.msix.connected(), f.owner.disconnects), (0, 1));
}

#[test]
fn vectors_that_the_source_has_lost_are_connected_again_when_they_are_unmasked() {
    let mut f = Fixture::new(4);
    f.control(ENABLE);
    f.mask(0, false);
    f.mask(1, false);
    f.owner.refuses = true;
    f.mask(2, false);
    assert_eq!(f.msix.connected(), 2, "refused, and nothing else");
    f.owner.loses = true;
    f.mask(2, false);
    assert_eq!(f.msix.connected(), 0);
    f.owner = FakeOwner::default();
    f.mask(1, true);
    f.mask(1, false);
    assert_eq!(f.owner.connects, [(1, 1)]);
    assert_eq!(f.msix.connected(), 1);
}

#[test]
fn moving_an_interrupt_to_another_cpu_is_one_update() {
    let mut f = Fixture::new(1);
    f.control(ENABLE);
    f.message(0, message(1));
    f.mask(0, false);
    f.mask(0, true);
    f.message(0, message(2));
    assert_eq!(f.routes.updates(), 0);
    f.mask(0, false);
    assert_eq!(f.routes.updates(), 1);
    f.mask(0, true);
    f.message(0, message(2));
    f.mask(0, false);
    assert_eq!(f.routes.updates(), 1, "the same message is no update");
    f.msix.trigger(0);
    assert_eq!(f.routes.arrived(), [message(2)]);
}

#[test]
fn message_and_unmask_in_one_quadword_connect_with_that_message() {
    let mut f = Fixture::new(1);
    f.control(ENABLE);
    let Fixture { msix, owner, .. } = &mut f;
    msix.table_write(0, &0xfee0_1000u64.to_le_bytes(), owner);
    msix.table_write(8, &5u64.to_le_bytes(), owner);
    f.msix.trigger(0);
    assert_eq!(
        (f.routes.arrived(), f.routes.updates()),
        (vec![message(5)], 0)
    );
}

#[test]
fn a_vector_that_cannot_be_connected_is_tried_again_at_the_next_unmask() {
    let mut f = Fixture::new(2);
    f.control(ENABLE);
    f.message(0, message(9));
    *f.routes.exhausted.lock().unwrap() = true;
    f.mask(0, false);
    *f.routes.exhausted.lock().unwrap() = false;
    f.owner.refuses = true;
    f.mask(0, false);
    assert_eq!(f.msix.connected(), 0);
    f.msix.trigger(0);
    assert_eq!((f.pba(), f.routes.arrived()), (1, vec![]));
    f.owner.refuses = false;
    f.mask(0, true);
    f.mask(0, false);
    assert_eq!((f.pba(), f.routes.arrived()), (0, vec![message(9)]));
}

#[test]
fn the_capability_says_size_and_places() {
    let f = Fixture::new(65);
    let table = MsixLocation {
        bar: 4,
        offset: 0x2000,
    };
    let pba = MsixLocation {
        bar: 2,
        offset: 0x8,
    };
    let body = f.msix.capability_body(table, pba);
    assert_eq!(body, [64, 0, 4, 0x20, 0, 0, 0xa, 0, 0, 0]);
    assert_eq!(MsixLocation::from_register(0x2004), table);
    assert_eq!((f.msix.table_size(), f.msix.pba_size()), (65 * 16, 16));
}

#[test]
fn a_pending_bit_is_where_its_vector_is() {
    let mut f = Fixture::new(70);
    f.control(ENABLE);
    f.msix.trigger(69);
    f.msix.trigger(70);
    let mut data = [0xff; 4];
    f.msix.pba_read(7, &mut data);
    assert_eq!(data, [0, 1 << 5, 0, 0]);
}

#[test]
fn the_sources_own_pending_bits_count_for_vectors_that_are_not_connected() {
    let mut f = Fixture::new(20);
    let read = |f: &Fixture, source: [u8; 3]| {
        let mut data = [0; 3];
        f.msix.pba_read(0, &mut data);
        f.msix.pba_add(0, &mut data, &source);
        data
    };
    assert_eq!(read(&f, [0xff; 3]), [0; 3], "while MSI-X is disabled");
    f.control(ENABLE);
    f.mask(1, false);
    f.mask(9, false);
    f.mask(9, true);
    f.msix.trigger(9);
    // A connected vector is never masked in the source, and the table has twenty.
    assert_eq!(read(&f, [0xff; 3]), [0xfd, 0xff, 0x0f]);
    assert_eq!(read(&f, [0b10, 0, 0b100]), [0, 0b10, 0b100]);
    let mut beyond = [0];
    f.msix.pba_add(u64::MAX, &mut beyond, &[0xff]);
    assert_eq!(beyond, [0]);
}

#[test]
fn an_interrupt_that_a_connection_holds_back_is_pending_in_the_state_and_arrives_after_a_restore() {
    let mut f = Fixture::new(2);
    f.control(ENABLE);
    f.message(1, message(9));
    f.mask(1, false);
    f.mask(1, true);
    f.msix.trigger(1);
    let state = f.msix.state();
    assert!(state.vectors[1].pending && state.vectors[1].masked);
    let mut g = Fixture::new(2);
    g.msix.restore(&state, &mut g.owner);
    assert_eq!((g.msix.connected(), g.owner.enables, g.pba()), (0, 1, 2));
    g.mask(1, false);
    assert_eq!((g.routes.arrived(), g.pba()), (vec![message(9)], 0));
}

#[test]
fn a_state_of_another_version_or_table_changes_nothing() {
    let mut f = Fixture::new(2);
    f.control(ENABLE);
    f.mask(0, false);
    let before = f.msix.state();
    let mut other = before.clone();
    other.version += 1;
    let larger = Fixture::new(3).msix.state();
    for (state, error) in [
        (other, MsixStateError::Version(2)),
        (larger, MsixStateError::Vectors { saved: 3, own: 2 }),
    ] {
        assert_eq!(f.msix.check(&state), Err(error));
        f.msix.restore(&state, &mut f.owner);
        assert_eq!(
            (f.msix.state(), f.msix.connected()),
            (before.clone(), 1),
            "{error}"
        );
    }
}

/// What a guest or a device does.
#[derive(Clone, Debug)]
enum Step {
    Control(u16),
    Dword { vector: u8, dword: u8, value: u32 },
    Unmask(u8, bool),
    Trigger(u8),
    Reset,
}

const VECTORS: u8 = 4;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let vector = 0..VECTORS;
    let step = prop_oneof![
        3 => prop::sample::select(vec![0, ENABLE, ENABLE | MASK, MASK]).prop_map(Step::Control),
        4 => (vector.clone(), 0..3u8, any::<u32>())
            .prop_map(|(vector, dword, value)| Step::Dword { vector, dword, value }),
        8 => (vector.clone(), any::<bool>()).prop_map(|(vector, mask)| Step::Unmask(vector, mask)),
        8 => vector.prop_map(Step::Trigger),
        1 => Just(Step::Reset),
    ];
    vec(step, 0..80)
}

/// MSI-X as the specification tells it: no routes, only messages and masks.
#[derive(Clone, Copy)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    pending: bool,
    connected: bool,
}

struct Model {
    control: u16,
    entries: [Entry; VECTORS as usize],
    arrived: Vec<MsiMessage>,
    connects: Vec<(u16, usize)>,
    disconnects: usize,
}

impl Model {
    const RESET: Entry = Entry {
        message: MsiMessage {
            address: 0,
            data: 0,
        },
        masked: true,
        pending: false,
        connected: false,
    };

    fn new() -> Self {
        Self {
            control: 0,
            entries: [Self::RESET; VECTORS as usize],
            arrived: Vec::new(),
            connects: Vec::new(),
            disconnects: 0,
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Control(control) => {
                if self.control & ENABLE != 0 && control & ENABLE == 0 {
                    self.disconnects += 1;
                    for entry in &mut self.entries {
                        (entry.pending, entry.connected) = (false, false);
                    }
                }
                self.control = control;
            }
            Step::Dword {
                vector,
                dword,
                value,
            } => {
                let message = &mut self.entries[usize::from(vector)].message;
                match dword {
                    0 => message.address = message.address >> 32 << 32 | u64::from(value & !3),
                    1 => message.address = message.address << 32 >> 32 | u64::from(value) << 32,
                    _ => message.data = value,
                }
            }
            Step::Unmask(vector, mask) => self.entries[usize::from(vector)].masked = mask,
            Step::Trigger(vector) => {
                if self.control & ENABLE != 0 {
                    self.entries[usize::from(vector)].pending = true;
                }
            }
            Step::Reset => {
                self.disconnects += usize::from(self.control & ENABLE != 0);
                self.control = 0;
                self.entries = [Self::RESET; VECTORS as usize];
            }
        }
        for (vector, entry) in (0..).zip(&mut self.entries) {
            if self.control & (ENABLE | MASK) == ENABLE && !entry.masked {
                if !std::mem::replace(&mut entry.connected, true) {
                    self.connects.push((vector, 1));
                }
                if std::mem::take(&mut entry.pending) {
                    self.arrived.push(entry.message);
                }
            }
        }
    }
}

impl Fixture {
    fn step(&mut self, step: &Step) {
        match *step {
            Step::Control(control) => self.control(control),
            Step::Dword {
                vector,
                dword,
                value,
            } => self.write(u64::from(vector) * 16 + u64::from(dword) * 4, value),
            Step::Unmask(vector, mask) => self.mask(vector.into(), mask),
            Step::Trigger(vector) => self.msix.trigger(vector.into()),
            Step::Reset => self.msix.reset(&mut self.owner),
        }
    }
}

proptest! {
    /// Whenever it is saved, what it is restored to goes on as the other would have.
    #[test]
    fn a_table_that_was_saved_and_restored_goes_on_as_if_nothing_had_been(
        before in steps(), after in steps(),
    ) {
        let mut f = Fixture::new(VECTORS.into());
        before.iter().for_each(|step| f.step(step));
        let arrived = f.routes.arrived().len();
        let mut g = Fixture::new(VECTORS.into());
        g.msix.restore(&f.msix.state(), &mut g.owner);
        prop_assert_eq!(g.msix.state(), f.msix.state());
        prop_assert!(g.msix.connected() <= f.msix.connected());
        for step in &after {
            f.step(step);
            g.step(step);
            prop_assert_eq!(&g.routes.arrived()[..], &f.routes.arrived()[arrived..]);
            prop_assert_eq!(g.pba(), f.pba());
        }
        prop_assert_eq!(g.msix.state(), f.msix.state());
    }

    /// None lost while masked, none doubled, none to an old message; and only what was unmasked is
    /// connected, once.
    #[test]
    fn every_interrupt_arrives_as_the_specification_has_it(steps in steps()) {
        let mut f = Fixture::new(VECTORS.into());
        let mut model = Model::new();
        for step in &steps {
            f.step(step);
            model.step(step);
            prop_assert_eq!(&f.routes.arrived(), &model.arrived);
            prop_assert_eq!(&f.owner.connects, &model.connects);
            prop_assert_eq!(f.owner.disconnects, model.disconnects);
            let pending = (0..).zip(&model.entries).filter(|(_, entry)| entry.pending);
            prop_assert_eq!(f.pba(), pending.fold(0, |bits, (vector, _)| bits | 1 << vector));
            let connected = model.entries.iter().filter(|entry| entry.connected).count();
            prop_assert_eq!(f.msix.connected(), connected);
            prop_assert_eq!(f.msix.control(), model.control | 3);
        }
    }

    #[test]
    fn no_access_of_any_offset_and_width_panics(
        accesses in vec((prop_oneof![0..200u64, any::<u64>()], vec(any::<u8>(), 0..40)), 0..40),
    ) {
        let mut f = Fixture::new(10);
        f.control(ENABLE);
        for (offset, data) in accesses {
            f.msix.table_write(offset, &data, &mut f.owner);
            let mut data = data;
            f.msix.table_read(offset, &mut data);
            f.msix.pba_read(offset, &mut data);
        }
    }
}
