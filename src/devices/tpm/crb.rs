//! The registers of a TPM with a command and response buffer, and what its driver can have done by them. TCG PC Client
//! Platform TPM Profile for TPM 2.0 (PTP) 1.05, §6.5.3; Linux, drivers/char/tpm/tpm_crb.c; EDK II, SecurityPkg's
//! Tpm2Ptp.c.
//!
//! There is locality 0, no interrupt, and one buffer for commands and responses behind the registers.

use super::command;

/// Bytes of the registers and of the buffer, which is locality 0's page.
pub const SIZE: u64 = 0x1000;
/// The control area, from where ACPI says that commands are started.
pub const CONTROL_AREA: u64 = CTRL_REQ as u64;

// Offsets. PTP 1.05, table 25.
const LOC_STATE: usize = 0x00;
const LOC_CTRL: usize = 0x08;
const LOC_STS: usize = 0x0c;
const INTF_ID: usize = 0x30;
const INTF_ID_HIGH: usize = 0x34;
const CTRL_REQ: usize = 0x40;
const CTRL_STS: usize = 0x44;
const CTRL_CANCEL: usize = 0x48;
const CTRL_START: usize = 0x4c;
const CMD_SIZE: usize = 0x58;
const CMD_LOW: usize = 0x5c;
const RSP_SIZE: usize = 0x64;
const RSP_LOW: usize = 0x68;
const BUFFER: usize = 0x80;

/// Bytes of the buffer.
pub(super) const BUFFER_SIZE: usize = SIZE as usize - BUFFER;

// TPM_LOC_STATE. The first bit is set while nothing has been measured by hardware (locality 4).
const NOT_ESTABLISHED: u32 = 1 << 0;
const ASSIGNED: u32 = 1 << 1;
const VALID: u32 = 1 << 7;
// TPM_LOC_CTRL
const REQUEST_ACCESS: u32 = 1 << 0;
const RELINQUISH: u32 = 1 << 1;
// TPM_LOC_STS
const GRANTED: u32 = 1 << 0;
// TPM_CRB_CTRL_REQ
const COMMAND_READY: u32 = 1 << 0;
const GO_IDLE: u32 = 1 << 1;
// TPM_CRB_CTRL_STS
const FATAL: u32 = 1 << 0;
const IDLE: u32 = 1 << 1;
/// TPM_CRB_CTRL_CANCEL and TPM_CRB_CTRL_START: the bit that does it.
const INVOKE: u32 = 1 << 0;

/// TPM_CRB_INTF_ID: a CRB (1 in bits 3:0) of version 1 (7:4), which has that interface alone (14), one locality (8 clear)
/// and transfers of 64 bytes (12:11).
const INTERFACE: u32 = 1 | 1 << 4 | 3 << 11 | 1 << 14;
/// Its vendor, in bits 47:32: IBM, as swtpm's library says of itself.
const VENDOR: u32 = 0x1014;

/// What a write asks for beside another state of the registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// A command is to be carried out, as [`Registers::finish`] or [`Registers::fail`] then says.
    Start(Vec<u8>),
    /// The one that is being carried out is not wanted any more.
    Cancel,
}

/// The registers and the buffer.
#[derive(Debug)]
pub(super) struct Registers {
    /// First address of the registers.
    base: u64,
    granted: bool,
    idle: bool,
    /// A command is being carried out.
    busy: bool,
    /// That command is to be cancelled.
    cancelled: bool,
    /// Another was started meanwhile, by a driver that does not wait for the first any more.
    overrun: bool,
    /// The TPM has failed, and answers nothing else until the next reset.
    failed: bool,
    established: bool,
    buffer: Box<[u8; BUFFER_SIZE]>,
}

impl Registers {
    /// Those at `base`, as after power-on.
    pub(super) fn new(base: u64) -> Self {
        Self {
            base,
            granted: false,
            idle: true,
            busy: false,
            cancelled: false,
            overrun: false,
            failed: false,
            established: false,
            buffer: Box::new([0; BUFFER_SIZE]),
        }
    }

    /// As after power-on: what was being carried out is nobody's any more.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.base);
    }

    /// Whether hardware has measured something (locality 4).
    pub(super) fn set_established(&mut self, established: bool) {
        self.established = established;
    }

    /// The command's response is there.
    pub(super) fn finish(&mut self, response: &[u8]) {
        let retry = command::response(command::RC_RETRY);
        // The driver takes what comes for the answer to what it asked last.
        let response = match self.overrun {
            true => &retry[..],
            false => response,
        };
        self.buffer.fill(0);
        let length = response.len().min(BUFFER_SIZE);
        if let (Some(to), Some(from)) = (self.buffer.get_mut(..length), response.get(..length)) {
            to.copy_from_slice(from);
        }
        (self.busy, self.cancelled, self.overrun) = (false, false, false);
    }

    /// The TPM cannot answer, now and until the next reset.
    pub(super) fn fail(&mut self) {
        self.failed = true;
        if self.busy {
            self.overrun = false;
            self.finish(&command::response(command::RC_FAILURE));
        }
    }

    /// Reads `data.len()` bytes at `offset`.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (number, byte) in data.iter_mut().enumerate() {
            let at = start.saturating_add(number);
            *byte = match at.checked_sub(BUFFER) {
                Some(at) => self.buffer.get(at).copied().unwrap_or(0xff),
                None => {
                    let [a, b, c, d] = self.register(at & !3).to_le_bytes();
                    [a, b, c, d].get(at % 4).copied().unwrap_or(0xff)
                }
            };
        }
    }

    fn register(&self, offset: usize) -> u32 {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        let buffer = self.base + BUFFER as u64;
        match offset {
            LOC_STATE => {
                VALID | bit(!self.established, NOT_ESTABLISHED) | bit(self.granted, ASSIGNED)
            }
            LOC_STS => bit(self.granted, GRANTED),
            INTF_ID => INTERFACE,
            INTF_ID_HIGH => VENDOR,
            CTRL_STS => bit(self.failed, FATAL) | bit(self.idle, IDLE),
            CTRL_CANCEL => bit(self.cancelled, INVOKE),
            CTRL_START => bit(self.busy, INVOKE),
            CMD_SIZE | RSP_SIZE => BUFFER_SIZE as u32,
            // Their upper halves, and all that is not there, are zero: the page is below 4 GiB.
            CMD_LOW | RSP_LOW => buffer as u32,
            _ => 0,
        }
    }

    /// Writes `data` at `offset`. A register does what the bits that are set in it ask for, so that a narrower write
    /// than the register is one of fewer bits.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut effect = Effect::None;
        let mut asked = [(0, 0_u32); 4];
        for (number, byte) in data.iter().enumerate() {
            let at = start.saturating_add(number);
            if let Some(at) = at.checked_sub(BUFFER) {
                let cell = self.buffer.get_mut(at).filter(|_| !self.busy);
                if let Some(cell) = cell {
                    *cell = *byte;
                }
                continue;
            }
            let register = at & !3;
            let bits = u32::from(*byte) << (8 * (at % 4));
            // An access has 8 bytes at most, but for string I/O, which there is none of in memory.
            let place = (register - (start & !3)) / 4;
            if let Some(place) = asked.get_mut(place) {
                *place = (register, place.1 | bits);
            }
        }
        for (register, bits) in asked.into_iter().filter(|(_, bits)| *bits != 0) {
            let next = self.ask(register, bits);
            if next != Effect::None {
                effect = next;
            }
        }
        effect
    }

    fn ask(&mut self, register: usize, bits: u32) -> Effect {
        match register {
            LOC_CTRL if bits & REQUEST_ACCESS != 0 => self.granted = true,
            LOC_CTRL if bits & RELINQUISH != 0 => self.granted = false,
            // While a command is carried out the state stays. PTP 1.05 §6.5.3.8
            CTRL_REQ if !self.busy && bits & COMMAND_READY != 0 => self.idle = false,
            CTRL_REQ if !self.busy && bits & GO_IDLE != 0 => self.idle = true,
            CTRL_CANCEL if bits & INVOKE != 0 && self.busy && !self.cancelled => {
                self.cancelled = true;
                return Effect::Cancel;
            }
            CTRL_START if bits & INVOKE != 0 && self.granted && !self.idle => return self.start(),
            _ => {}
        }
        Effect::None
    }

    fn start(&mut self) -> Effect {
        if self.busy {
            self.overrun = true;
            return Effect::None;
        }
        self.busy = true;
        if self.failed {
            self.fail();
            return Effect::None;
        }
        let command = command::size(&self.buffer[..]);
        let command = command.and_then(|size| self.buffer.get(..size));
        match command {
            Some(command) => Effect::Start(command.to_vec()),
            None => {
                self.finish(&command::response(command::RC_COMMAND_SIZE));
                Effect::None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BASE: u64 = 0xfed4_0000;

    fn read(registers: &Registers, offset: usize) -> u32 {
        let mut data = [0; 4];
        registers.read(offset as u64, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(registers: &mut Registers, offset: usize, value: u32) -> Effect {
        registers.write(offset as u64, &value.to_le_bytes())
    }

    /// `TPM2_GetRandom` of a byte. TPM 2.0 Library, Part 3, §16.1
    const COMMAND: [u8; 12] = [0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 1];

    /// Does as Linux does up to the start of a command.
    fn begin(registers: &mut Registers) -> Effect {
        assert_eq!(write(registers, LOC_CTRL, REQUEST_ACCESS), Effect::None);
        assert_eq!(read(registers, LOC_STATE), 0x83);
        assert_eq!(write(registers, CTRL_REQ, COMMAND_READY), Effect::None);
        assert_eq!(read(registers, CTRL_REQ), 0);
        assert_eq!(registers.write(BUFFER as u64, &COMMAND), Effect::None);
        write(registers, CTRL_START, INVOKE)
    }

    fn answer(registers: &Registers) -> [u8; 10] {
        let mut answer = [0; 10];
        registers.read(BUFFER as u64, &mut answer);
        answer
    }

    #[test]
    fn a_driver_finds_a_crb_of_one_locality_whose_buffer_lies_behind_it() {
        let mut registers = Registers::new(BASE);
        assert_eq!(read(&registers, LOC_STATE), 0x81);
        registers.set_established(true);
        assert_eq!(read(&registers, LOC_STATE), 0x80);
        // InterfaceType, InterfaceVersion, CapLocality, CapCRB: what EDK II and Linux look at.
        let interface = read(&registers, INTF_ID);
        assert_eq!((interface & 0xf, interface >> 4 & 0xf), (1, 1));
        assert_eq!((interface >> 8 & 1, interface >> 14 & 1), (0, 1));
        for size in [CMD_SIZE, RSP_SIZE] {
            assert_eq!(read(&registers, size), 3968);
        }
        for low in [CMD_LOW, RSP_LOW] {
            assert_eq!(
                (read(&registers, low), read(&registers, low + 4)),
                (0xfed4_0080, 0)
            );
        }
        // All 64 bits at once, and a byte of them.
        let mut whole = [0; 8];
        registers.read(RSP_LOW as u64, &mut whole);
        assert_eq!(u64::from_le_bytes(whole), 0xfed4_0080);
        let mut byte = [0];
        registers.read(RSP_LOW as u64 + 3, &mut byte);
        assert_eq!(byte, [0xfe]);
    }

    #[test]
    fn a_command_is_started_and_answered_as_a_driver_expects() {
        let mut registers = Registers::new(BASE);
        assert_eq!(begin(&mut registers), Effect::Start(COMMAND.to_vec()));
        assert_eq!(read(&registers, CTRL_START), INVOKE);
        // The buffer and the state stay as they are meanwhile.
        registers.write(BUFFER as u64, &[0xff; 4]);
        write(&mut registers, CTRL_REQ, GO_IDLE);
        assert_eq!(read(&registers, CTRL_STS), 0);
        assert_eq!(answer(&registers)[..2], [0x80, 1]);
        let response = [0x80, 1, 0, 0, 0, 13, 0, 0, 0, 0, 0, 1, 7];
        registers.finish(&response);
        assert_eq!(
            (read(&registers, CTRL_START), answer(&registers)),
            (0, response[..10].try_into().unwrap())
        );
        write(&mut registers, CTRL_REQ, GO_IDLE);
        assert_eq!(read(&registers, CTRL_STS), IDLE);
        write(&mut registers, LOC_CTRL, RELINQUISH);
        assert_eq!(
            (read(&registers, LOC_STATE), read(&registers, LOC_STS)),
            (0x81, 0)
        );
    }

    #[test]
    fn nothing_is_started_without_a_locality_while_idle_or_with_a_size_that_no_command_has() {
        let mut registers = Registers::new(BASE);
        registers.write(BUFFER as u64, &COMMAND);
        assert_eq!(write(&mut registers, CTRL_START, INVOKE), Effect::None);
        write(&mut registers, LOC_CTRL, REQUEST_ACCESS);
        assert_eq!(write(&mut registers, CTRL_START, INVOKE), Effect::None);
        write(&mut registers, CTRL_REQ, COMMAND_READY);
        for size in [0, 9, BUFFER_SIZE as u32 + 1, u32::MAX] {
            registers.write(BUFFER as u64 + 2, &size.to_be_bytes());
            assert_eq!(write(&mut registers, CTRL_START, INVOKE), Effect::None);
            assert!(!registers.busy);
            assert_eq!(
                answer(&registers),
                command::response(command::RC_COMMAND_SIZE)
            );
        }
        registers.write(BUFFER as u64 + 2, &(BUFFER_SIZE as u32).to_be_bytes());
        let Effect::Start(command) = write(&mut registers, CTRL_START, INVOKE) else {
            panic!("the largest command is one");
        };
        assert_eq!(command.len(), BUFFER_SIZE);
    }

    #[test]
    fn a_command_is_cancelled_once_and_one_started_meanwhile_is_to_be_sent_again() {
        let mut registers = Registers::new(BASE);
        assert_eq!(write(&mut registers, CTRL_CANCEL, INVOKE), Effect::None);
        begin(&mut registers);
        assert_eq!(write(&mut registers, CTRL_CANCEL, INVOKE), Effect::Cancel);
        assert_eq!(write(&mut registers, CTRL_CANCEL, INVOKE), Effect::None);
        assert_eq!(write(&mut registers, CTRL_START, INVOKE), Effect::None);
        registers.finish(&[0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0]);
        assert_eq!(answer(&registers), command::response(command::RC_RETRY));
        assert_eq!(begin(&mut registers), Effect::Start(COMMAND.to_vec()));
        registers.finish(&[0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0]);
        assert_eq!(answer(&registers)[6..], [0; 4]);
    }

    #[test]
    fn a_tpm_that_has_failed_answers_at_once_that_it_has_until_the_reset() {
        let mut registers = Registers::new(BASE);
        begin(&mut registers);
        registers.fail();
        for _ in 0..2 {
            assert!(!registers.busy);
            assert_eq!(answer(&registers), command::response(command::RC_FAILURE));
            assert_eq!(read(&registers, CTRL_STS), FATAL);
            assert_eq!(begin(&mut registers), Effect::None);
        }
        registers.reset();
        assert_eq!(begin(&mut registers), Effect::Start(COMMAND.to_vec()));
    }

    proptest! {
        #[test]
        fn any_access_is_answered_and_no_command_is_larger_than_the_buffer(
            accesses in proptest::collection::vec(
                (prop_oneof![0_u64..SIZE + 16, Just(0x08), Just(0x40), Just(0x4c), Just(u64::MAX)],
                 proptest::collection::vec(any::<u8>(), 1..40), any::<bool>()),
                0..200,
            ),
        ) {
            let mut registers = Registers::new(BASE);
            let mut busy = false;
            for (offset, mut data, ends) in accesses {
                registers.read(offset, &mut data);
                match registers.write(offset, &data) {
                    Effect::Start(command) => {
                        prop_assert!(!busy && (10..=BUFFER_SIZE).contains(&command.len()));
                        prop_assert_eq!(command::size(&command), Some(command.len()));
                        busy = true;
                    }
                    Effect::Cancel => prop_assert!(busy),
                    Effect::None => {}
                }
                prop_assert_eq!(registers.busy, busy);
                if ends && busy {
                    registers.finish(&data);
                    busy = false;
                }
            }
        }
    }
}
