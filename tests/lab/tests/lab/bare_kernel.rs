//! Kernels of a few instructions, which do what takes a real one seconds in a hundredth: drive a
//! device's registers and DMA, and restart the machine.

use crate::bare::{kernel, power_off, say};

/// Where the instructions are loaded and entered, in 32-bit mode, with paging off.
const BASE: u32 = 0x10_0000;
/// A page behind the instructions: what a drive reads, and then three that it writes to.
const PAGE: u32 = 0x1000;

/// Instructions, with what they need that has an address.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn add(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    fn say(&mut self, text: &str) -> &mut Self {
        self.add(&say(text))
    }

    /// `mov dx, port; mov eax, value; out dx, eax`
    fn outl(&mut self, port: u16, value: u32) -> &mut Self {
        self.add(&[0x66, 0xba]).add(&port.to_le_bytes());
        self.add(&[0xb8]).add(&value.to_le_bytes()).add(&[0xef])
    }

    /// Turns memory decoding and bus mastering on in the function at `bus`:00.`function`, and puts what
    /// its BAR says into ebx.
    fn open(&mut self, bus: u8, function: u8, bar: u8) -> &mut Self {
        let register =
            |offset: u32| 0x8000_0000 | u32::from(bus) << 16 | u32::from(function) << 8 | offset;
        self.outl(0xcf8, register(4)).outl(0xcfc, 6);
        self.outl(0xcf8, register(0x10 + 4 * u32::from(bar)));
        // mov dx, 0xcfc; in eax, dx; and eax, ~15; mov ebx, eax
        self.add(&[0x66, 0xba, 0xfc, 0x0c, 0xed, 0x83, 0xe0, 0xf0, 0x89, 0xc3])
    }

    /// `mov dword [ebx + register], value`
    fn set(&mut self, register: u32, value: u32) -> &mut Self {
        self.add(&[0xc7, 0x83]).add(&register.to_le_bytes());
        self.add(&value.to_le_bytes())
    }

    /// `again: mov eax, [ebx + register]; test al, bit; jz again`
    fn wait(&mut self, register: u32, bit: u8) -> &mut Self {
        self.add(&[0x8b, 0x83]).add(&register.to_le_bytes());
        self.add(&[0xa8, bit, 0x74, 0xf6])
    }

    /// `condition` is that of a short jump, past `then`.
    fn unless(&mut self, condition: u8, then: &Self) -> &mut Self {
        let length = i8::try_from(then.0.len()).expect("a short jump");
        self.add(&[condition, length as u8]).add(&then.0)
    }

    /// `jmp` to itself.
    fn stay(&mut self) -> &mut Self {
        self.add(&[0xeb, 0xfe])
    }
}

/// `je`
const EQUAL: u8 = 0x74;
/// `jne`
const NOT_EQUAL: u8 = 0x75;
/// `jl`
const LESS: u8 = 0x7c;

/// Has the NVMe drive at 01:00.0 identify itself by DMA, says `io done` if its serial number begins
/// with `serial`, and stays, with the drive running. NVMe 2.0 §3.1.3, §3.3.1, §5.17
pub(crate) fn identify(serial: [u8; 4]) -> Vec<u8> {
    let [submission, completion, data] = [1, 2, 3].map(|page| BASE + page * PAGE);
    let mut code = Code::default();
    code.open(1, 0, 0);
    // AQA, ASQ, ACQ, CC: two entries in each queue, of 64 and 16 bytes; enable; CSTS: ready.
    code.set(0x24, 0x0001_0001);
    code.set(0x28, submission).set(0x2c, 0);
    code.set(0x30, completion).set(0x34, 0);
    code.set(0x14, 0x0046_0001).wait(0x1c, 1);
    // The submission queue's doorbell; then the completion's phase: again: test byte [..], 1; jz again
    code.set(0x1000, 1);
    code.add(&[0xf6, 0x05])
        .add(&(completion + 14).to_le_bytes());
    code.add(&[1, 0x74, 0xf7]);
    // cmp dword [data + 4], serial
    code.add(&[0x81, 0x3d])
        .add(&(data + 4).to_le_bytes())
        .add(&serial);
    let mut wrong = Code::default();
    wrong.say("wrong\n").stay();
    code.unless(EQUAL, &wrong).say("io done\n").stay();

    assert!(code.0.len() < PAGE as usize);
    let mut image = code.0;
    image.resize(PAGE as usize, 0);
    // Identify, command 1, no namespace; the data's page; the controller's structure.
    let mut command = [0_u32; 16];
    (command[0], command[6], command[10]) = (0x0001_0006, data, 1);
    image.extend(command.iter().flat_map(|word| word.to_le_bytes()));
    kernel(&image)
}

/// A register that has one value at power-on, and another when the guest has been there.
pub(crate) struct Trace {
    /// The device is at this bus, device 0.
    pub(crate) bus: u8,
    pub(crate) function: u8,
    pub(crate) bar: u8,
    pub(crate) offset: u32,
    /// The bits that the guest changes.
    pub(crate) change: u32,
}

/// Restarts the machine `times` times, leaving a trace in each device, and says `fresh` if none of them
/// was there at the next start. RAM outlives a restart: it holds the count, and what each register
/// held at the first start.
pub(crate) fn restart(times: u8, traces: &[Trace]) -> Vec<u8> {
    let memory = BASE + 0x10_0000;
    let count = memory.to_le_bytes();
    let mut code = Code::default();
    for (at, trace) in traces.iter().enumerate() {
        let first = (memory + 8 + 4 * at as u32).to_le_bytes();
        let register = trace.offset.to_le_bytes();
        code.open(trace.bus, trace.function, trace.bar);
        // mov eax, [ebx + register]; cmp dword [count], 0; at the first start: mov [first], eax
        code.add(&[0x8b, 0x83]).add(&register);
        code.add(&[0x83, 0x3d]).add(&count).add(&[0]);
        let mut remember = Code::default();
        remember.add(&[0xa3]).add(&first);
        code.unless(NOT_EQUAL, &remember);
        // cmp eax, [first]
        let mut stale = Code::default();
        stale.say(&format!("stale {at}\n")).add(&power_off());
        code.add(&[0x3b, 0x05]).add(&first).unless(EQUAL, &stale);
        // xor eax, change; mov [ebx + register], eax; cmp [ebx + register], eax
        code.add(&[0x35]).add(&trace.change.to_le_bytes());
        code.add(&[0x89, 0x83]).add(&register);
        code.add(&[0x39, 0x83]).add(&register);
        let mut lost = Code::default();
        lost.say(&format!("no trace {at}\n")).add(&power_off());
        code.unless(EQUAL, &lost);
    }
    // inc dword [count]; cmp dword [count], times + 1; less: the reset control register
    code.add(&[0xff, 0x05]).add(&count);
    code.add(&[0x83, 0x3d]).add(&count).add(&[times + 1]);
    let mut done = Code::default();
    done.say("fresh\n").add(&power_off());
    code.unless(LESS, &done);
    code.add(&[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee]).stay();
    kernel(&code.0)
}
