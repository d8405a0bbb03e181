use super::*;
use crate::virtio::spec;
use proptest::prelude::*;
use std::time::{Duration, Instant};

const RAM: u64 = 1 << 20;
const TABLE: u64 = 0x1000;
const SIZE: u32 = 16;
const INDIRECT: u64 = 0x8000;

const NEXT: u16 = spec::DESC_F_NEXT;
const WRITE: u16 = spec::DESC_F_WRITE;
const TABLE_OF: u16 = spec::DESC_F_INDIRECT;

type Raw = (u64, u32, u16, u16);

fn memory() -> RamMap {
    RamMap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
}

fn put(memory: &RamMap, table: u64, index: u64, (address, len, flags, next): Raw) {
    let descriptor = Descriptor {
        address: address.into(),
        len: len.into(),
        flags: flags.into(),
        next: next.into(),
    };
    memory
        .write_slice(descriptor.as_bytes(), GuestAddress(table + index * 16))
        .unwrap();
}

fn own() -> Table {
    Table {
        address: TABLE,
        size: SIZE,
    }
}

/// What comes of a chain of these descriptors, in the queue's table and in an indirect one: the bytes that
/// are read and written.
fn walked(direct: &[Raw], indirect: &[Raw]) -> Result<(usize, usize), &'static str> {
    let memory = memory();
    for (table, descriptors) in [(TABLE, direct), (INDIRECT, indirect)] {
        for (index, descriptor) in (0..).zip(descriptors) {
            put(&memory, table, index, *descriptor);
        }
    }
    let chain = walk(&memory, own(), 0)?;
    Ok((chain.readable.len(), chain.writable.len()))
}

#[test]
fn indirect_tables_of_every_shape_that_is_allowed_are_followed() {
    let table = |bytes| (INDIRECT, bytes, TABLE_OF, 0);
    let two = [(0x100, 16, NEXT, 1), (0x200, 512, WRITE, 0)];
    assert_eq!(walked(&[table(32)], &two), Ok((16, 512)));
    // Behind descriptors of the queue's own table, and with a flag that is to be ignored.
    let behind = [(0x300, 4, NEXT, 1), (INDIRECT, 32, TABLE_OF | WRITE, 0)];
    assert_eq!(walked(&behind, &two), Ok((20, 512)));
    // Out of order, and with entries that nothing leads to.
    let mixed = [(0x100, 16, NEXT, 2), (0, 0, 0, 0), (0x200, 1, WRITE, 0)];
    assert_eq!(walked(&[table(48)], &mixed), Ok((16, 1)));
    assert_eq!(
        walked(&[(0x100, 0, NEXT, 1), (0x100, 1, WRITE, 0)], &[]),
        Ok((0, 1))
    );
    // A table that is larger than a chain can be, of which it uses two.
    assert_eq!(walked(&[table(0xf000)], &two), Ok((16, 512)));
}

#[test]
fn what_is_no_chain_is_refused_with_what_is_wrong() {
    let table = |bytes| (INDIRECT, bytes, TABLE_OF, 0);
    let read = (0x100, 16, 0, 0);
    let cases: [(&[Raw], &[Raw], &str); 14] = [
        (&[(0x100, 16, NEXT, 0)], &[], "more buffers"),
        (&[(0x100, 0, NEXT, 0)], &[], "a loop"),
        (&[(0x100, 16, NEXT, 16)], &[], "beyond its table"),
        (&[(RAM, 16, 0, 0)], &[], "outside of RAM"),
        (&[(0x100, u32::MAX, 0, 0)], &[], "outside of RAM"),
        (&[(u64::MAX, 16, 0, 0)], &[], "outside of RAM"),
        (
            &[(0x100, 16, WRITE | NEXT, 1), (0x100, 16, 0, 0)],
            &[],
            "readable buffer after",
        ),
        (&[table(0)], &[], "no whole number"),
        (&[table(24)], &[], "no whole number"),
        (
            &[(INDIRECT, 16, TABLE_OF | NEXT, 1), read],
            &[read],
            "not the chain's end",
        ),
        (&[table(16)], &[(TABLE, 16, TABLE_OF, 0)], "within another"),
        (&[table(16)], &[(0x100, 16, NEXT, 1)], "beyond its table"),
        (
            &[table(32)],
            &[(0x100, 16, NEXT, 1), (0x100, 16, NEXT, 0)],
            "a loop",
        ),
        (&[(RAM - 8, 32, TABLE_OF, 0)], &[], "outside of RAM"),
    ];
    for (direct, indirect, what) in cases {
        let error = walked(direct, indirect).unwrap_err();
        assert!(error.contains(what), "{error}: {direct:?} {indirect:?}");
    }
    let beyond = walk(&memory(), own(), SIZE as u16).unwrap_err();
    assert!(beyond.contains("beyond its table"), "{beyond}");
    let nowhere = Table {
        address: u64::MAX - 8,
        size: SIZE,
    };
    assert!(walk(&memory(), nowhere, 1).is_err());
}

fn raw() -> impl Strategy<Value = Raw> {
    let address = prop_oneof![
        4 => 0..RAM,
        2 => Just(INDIRECT),
        1 => Just(TABLE),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => 0_u32..4096,
        2 => (0_u32..64).prop_map(|count| count * 16),
        1 => Just(0),
        1 => Just(u32::MAX),
        1 => any::<u32>(),
    ];
    (
        address,
        len,
        0_u16..8,
        prop_oneof![4 => 0_u16..20, 1 => any::<u16>()],
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_tables_whatever_make_a_walk_long_or_lead_out_of_ram(
        direct in proptest::collection::vec(raw(), 0..16),
        indirect in proptest::collection::vec(raw(), 0..64),
        head in 0_u16..20,
    ) {
        let memory = std::sync::Arc::new(memory());
        for (table, descriptors) in [(TABLE, &direct), (INDIRECT, &indirect)] {
            for (index, descriptor) in (0..).zip(descriptors) {
                put(&memory, table, index, *descriptor);
            }
        }
        let start = Instant::now();
        if let Ok(chain) = walk(&memory, own(), head) {
            prop_assert_eq!(chain.head(), head);
            prop_assert!(chain.readable.len() + chain.writable.len() <= MAX_BYTES);
            prop_assert!(crate::virtio::segments::Held::new(&memory, &chain.readable).is_some());
            prop_assert!(crate::virtio::segments::Held::new(&memory, &chain.writable).is_some());
        }
        prop_assert!(start.elapsed() < Duration::from_secs(1));
    }
}
