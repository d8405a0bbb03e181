//! The commands of a NOR flash chip, as a state machine over its array: the common flash interface with
//! Intel's command set, as QEMU's `cfi.pflash01` has it with a width of one byte. References are to JEDEC
//! JESD68 (CFI) and to Intel's StrataFlash J3 data sheet, "Command Definitions".

/// Bytes that are erased together.
pub(super) const BLOCK: u64 = 0x1000;
/// Bytes that can be programmed by one command.
const BUFFER: usize = 0x100;

// Commands.
const PROGRAM: u8 = 0x10;
const PROGRAM_TOO: u8 = 0x40;
const ERASE: u8 = 0x20;
const CLEAR_STATUS: u8 = 0x50;
const LOCK: u8 = 0x60;
const READ_STATUS: u8 = 0x70;
const READ_ID: u8 = 0x90;
const QUERY: u8 = 0x98;
const PROGRAM_BUFFER: u8 = 0xe8;
const CONFIRM: u8 = 0xd0;
const LOCK_CONFIRM: u8 = 0x01;

/// Status: the chip is ready.
const READY: u8 = 1 << 7;
/// Status: a sequence of commands was wrong. Erase and program error together.
const SEQUENCE_ERROR: u8 = 1 << 5 | 1 << 4;

/// Manufacturer (Intel) and device, as `cfi.pflash01`'s on a PC.
const IDENTITY: [u8; 2] = [0x89, 0x18];

/// The memory of a chip.
pub(super) trait Array {
    /// Bytes.
    fn size(&self) -> u64;

    /// Puts `data` at `offset`; what is beyond the end is dropped.
    fn program(&mut self, offset: u64, data: &[u8]);

    /// Sets all bits of a block.
    fn erase(&mut self, offset: u64, length: u64);
}

/// What the chip shows and waits for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum ChipMode {
    /// The array.
    #[default]
    Array,
    /// The status.
    Status,
    Identity,
    Query,
    /// The next write is data.
    Program,
    /// The next write confirms.
    Erase,
    Lock,
    /// The next write is how many bytes follow, less one.
    Count,
    /// Bytes follow, then a confirmation.
    Fill {
        left: usize,
        buffer: Buffer,
    },
}

/// What is to be programmed at once, from `start` on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Buffer {
    start: Option<u64>,
    data: Vec<u8>,
}

/// A chip's state, apart from what its array holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cfi {
    mode: ChipMode,
    status: u8,
}

impl Default for Cfi {
    fn default() -> Self {
        Self {
            mode: ChipMode::Array,
            status: READY,
        }
    }
}

impl Cfi {
    /// Whether a read shows the array.
    pub(super) fn shows_array(&self) -> bool {
        self.mode == ChipMode::Array
    }

    /// What a byte reads while it does not show the array of `size` bytes.
    pub(super) fn read(&self, offset: u64, size: u64) -> u8 {
        match &self.mode {
            // Above the two, a block's lock: none is locked.
            ChipMode::Identity => {
                let at = usize::try_from(offset % 0x100).unwrap_or(0);
                IDENTITY.get(at).copied().unwrap_or(0)
            }
            ChipMode::Query => query(offset, size),
            _ => self.status,
        }
    }

    /// A write of one to eight bytes.
    pub(super) fn write(&mut self, array: &mut impl Array, offset: u64, data: &[u8]) {
        let Some(&byte) = data.first() else {
            return;
        };
        self.mode = match std::mem::take(&mut self.mode) {
            ChipMode::Array | ChipMode::Status | ChipMode::Identity | ChipMode::Query => {
                self.command(byte)
            }
            ChipMode::Program => {
                array.program(offset, data);
                self.status |= READY;
                ChipMode::Status
            }
            ChipMode::Erase if byte == CONFIRM => {
                array.erase(offset - offset % BLOCK, BLOCK);
                self.status |= READY;
                ChipMode::Status
            }
            ChipMode::Lock if [CONFIRM, LOCK_CONFIRM].contains(&byte) => {
                self.status |= READY;
                ChipMode::Status
            }
            ChipMode::Erase | ChipMode::Lock => self.out_of_sequence(byte),
            ChipMode::Count => ChipMode::Fill {
                left: usize::from(byte) + 1,
                buffer: Buffer {
                    start: None,
                    data: Vec::with_capacity(BUFFER),
                },
            },
            ChipMode::Fill { left: 0, buffer } if byte == CONFIRM => {
                array.program(buffer.start.unwrap_or(offset), &buffer.data);
                self.status |= READY;
                ChipMode::Status
            }
            ChipMode::Fill { left: 0, .. } => self.out_of_sequence(byte),
            ChipMode::Fill { left, mut buffer } => {
                let start = *buffer.start.get_or_insert(offset);
                let at = offset.checked_sub(start);
                let at = at.and_then(|at| usize::try_from(at).ok());
                for (at, byte) in (at.unwrap_or(BUFFER)..BUFFER).zip(data) {
                    if at >= buffer.data.len() {
                        buffer.data.resize(at + 1, u8::MAX);
                    }
                    if let Some(to) = buffer.data.get_mut(at) {
                        *to = *byte;
                    }
                }
                ChipMode::Fill {
                    left: left.saturating_sub(data.len()),
                    buffer,
                }
            }
        };
    }

    fn command(&mut self, byte: u8) -> ChipMode {
        match byte {
            PROGRAM | PROGRAM_TOO => ChipMode::Program,
            ERASE => ChipMode::Erase,
            LOCK => ChipMode::Lock,
            READ_STATUS => ChipMode::Status,
            READ_ID => ChipMode::Identity,
            QUERY => ChipMode::Query,
            PROGRAM_BUFFER => {
                self.status |= READY;
                ChipMode::Count
            }
            CLEAR_STATUS => {
                self.status = 0;
                ChipMode::Array
            }
            // 0xff, and whatever is no command.
            _ => ChipMode::Array,
        }
    }

    /// Something else than a confirmation: nothing is done, and the status says so.
    fn out_of_sequence(&mut self, byte: u8) -> ChipMode {
        self.status |= READY | SEQUENCE_ERROR;
        match byte {
            u8::MAX => ChipMode::Array,
            _ => ChipMode::Status,
        }
    }
}

/// A byte of the query structure of a chip of `size` bytes. JESD68, tables 1 to 5.
fn query(offset: u64, size: u64) -> u8 {
    let blocks = (size / BLOCK).saturating_sub(1);
    let [blocks_low, blocks_high, ..] = blocks.to_le_bytes();
    let [block_low, block_high, ..] = (BLOCK / 0x100).to_le_bytes();
    let exponent = size.checked_ilog2().unwrap_or(0) as u8;
    match offset % 0x100 {
        0x10 => b'Q',
        0x11 => b'R',
        0x12 => b'Y',
        // Intel's command set, whose own table is at 0x31.
        0x13 => 1,
        0x15 => 0x31,
        // Supply voltage: 4.5 to 5.5 V.
        0x1b => 0x45,
        0x1c => 0x55,
        // Times, as powers of two: a byte, a buffer, a block.
        0x1f | 0x20 => 7,
        0x21 => 10,
        // Most of each: as many times longer.
        0x23..=0x25 => 4,
        0x27 => exponent,
        // Width: 8 and 16 bits.
        0x28 => 2,
        0x2a => BUFFER.ilog2() as u8,
        // One region of equal blocks: how many less one, and their size in 256 bytes.
        0x2c => 1,
        0x2d => blocks_low,
        0x2e => blocks_high,
        0x2f => block_low,
        0x30 => block_high,
        0x31 => b'P',
        0x32 => b'R',
        0x33 => b'I',
        0x34 => b'1',
        0x35 => b'0',
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Chip(Vec<u8>);

    impl Array for Chip {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }

        fn program(&mut self, offset: u64, data: &[u8]) {
            for (to, from) in self.0.iter_mut().skip(offset as usize).zip(data) {
                *to = *from;
            }
        }

        fn erase(&mut self, offset: u64, length: u64) {
            let block = self.0.iter_mut().skip(offset as usize);
            block.take(length as usize).for_each(|byte| *byte = 0xff);
        }
    }

    fn chip() -> (Cfi, Chip) {
        (Cfi::default(), Chip(vec![0x11; 0x4000]))
    }

    #[test]
    fn firmware_finds_out_that_it_is_flash_and_no_ram() {
        let (mut cfi, mut chip) = chip();
        cfi.write(&mut chip, 7, &[CLEAR_STATUS]);
        assert!(cfi.shows_array());
        cfi.write(&mut chip, 7, &[READ_STATUS]);
        assert!(!cfi.shows_array());
        assert_eq!(cfi.read(7, chip.size()), 0);
        cfi.write(&mut chip, 7, &[0xff]);
        assert!(cfi.shows_array());
        assert!(chip.0.iter().all(|byte| *byte == 0x11));
    }

    #[test]
    fn a_byte_is_programmed_and_a_block_erased_and_both_say_ready() {
        let (mut cfi, mut chip) = chip();
        for (at, byte) in [(0x1001, 0xab), (0x1002, 0xff)] {
            cfi.write(&mut chip, at, &[PROGRAM]);
            cfi.write(&mut chip, at, &[byte]);
            assert_eq!(cfi.read(at, 0x4000), READY);
        }
        cfi.write(&mut chip, 0x1003, &[PROGRAM_TOO]);
        cfi.write(&mut chip, 0x1003, &[1, 2]);
        assert_eq!(chip.0[0x1000..0x1006], [0x11, 0xab, 0xff, 1, 2, 0x11]);
        cfi.write(&mut chip, 0x1234, &[ERASE]);
        assert_eq!(chip.0[0x1001], 0xab, "not before it is confirmed");
        cfi.write(&mut chip, 0x1234, &[CONFIRM]);
        assert!(chip.0[0x1000..0x2000].iter().all(|byte| *byte == 0xff));
        assert_eq!([chip.0[0xfff], chip.0[0x2000]], [0x11; 2]);
        assert!(!cfi.shows_array());
        cfi.write(&mut chip, 0, &[0xff]);
        assert!(cfi.shows_array());
    }

    #[test]
    fn an_erase_that_is_not_confirmed_erases_nothing_and_is_an_error() {
        let (mut cfi, mut chip) = chip();
        cfi.write(&mut chip, 0, &[ERASE]);
        cfi.write(&mut chip, 0, &[0x33]);
        assert_eq!(cfi.read(0, 0x4000), READY | SEQUENCE_ERROR);
        assert_eq!(chip.0[0], 0x11);
        cfi.write(&mut chip, 0, &[CLEAR_STATUS]);
        cfi.write(&mut chip, 0, &[READ_STATUS]);
        assert_eq!(cfi.read(0, 0x4000), 0);
    }

    #[test]
    fn a_buffer_is_programmed_when_it_is_confirmed() {
        let (mut cfi, mut chip) = chip();
        cfi.write(&mut chip, 0x20, &[PROGRAM_BUFFER]);
        assert_eq!(cfi.read(0x20, 0x4000), READY);
        cfi.write(&mut chip, 0x20, &[3]);
        for (at, byte) in [(0x20, 1), (0x21, 2), (0x22, 3), (0x23, 4)] {
            cfi.write(&mut chip, at, &[byte]);
        }
        assert_eq!(chip.0[0x20], 0x11);
        cfi.write(&mut chip, 0x20, &[CONFIRM]);
        assert_eq!(chip.0[0x1f..0x25], [0x11, 1, 2, 3, 4, 0x11]);
    }

    #[test]
    fn identity_and_query_say_which_chip_it_is() {
        let (mut cfi, mut chip) = chip();
        cfi.write(&mut chip, 0, &[READ_ID]);
        let read = |cfi: &Cfi, at| cfi.read(at, 0x4000);
        assert_eq!(
            [read(&cfi, 0), read(&cfi, 1), read(&cfi, 2)],
            [0x89, 0x18, 0]
        );
        cfi.write(&mut chip, 0x55, &[QUERY]);
        let text: Vec<u8> = (0x10..0x14).map(|at| read(&cfi, at)).collect();
        assert_eq!(text, *b"QRY\x01");
        assert_eq!([read(&cfi, 0x27), read(&cfi, 0x2d)], [14, 3]);
        assert_eq!([read(&cfi, 0x2f), read(&cfi, 0x30)], [0x10, 0]);
    }

    proptest! {
        #[test]
        fn no_sequence_of_writes_panics_or_grows(
            writes in proptest::collection::vec(
                (any::<u64>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..200
            ),
            near in proptest::collection::vec((0_u64..0x5000, prop::sample::select(
                &[PROGRAM, ERASE, CONFIRM, PROGRAM_BUFFER, QUERY, LOCK, 0xff][..]
            )), 0..200),
        ) {
            let (mut cfi, mut chip) = chip();
            for (offset, data) in writes {
                cfi.write(&mut chip, offset, &data);
                let _any = cfi.read(offset, chip.size());
            }
            for (offset, command) in near {
                cfi.write(&mut chip, offset, &[command]);
                if let ChipMode::Fill { buffer, .. } = &cfi.mode {
                    prop_assert!(buffer.data.len() <= BUFFER);
                }
            }
            prop_assert_eq!(chip.0.len(), 0x4000);
        }
    }
}
