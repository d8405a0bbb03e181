//! The emulator with one store less: the one by which it delivers an interrupt to a guest twice.
//!
//! QEMU's `helper_vmrun` (target/i386/tcg/system/svm_helper.c) delivers the interrupt that a VMM injects, and leaves
//! its vector in `exception_index`, as if it were still to be delivered. If another thread asks the processor to leave
//! its loop before the guest does so by itself, the interrupt is delivered again, wherever the guest is by then. Guests
//! stand still, crash or count too many of it.
//!
//! The function gives the vector to `do_interrupt_x86_hardirq` as an argument, so nothing needs the store. It is found
//! by the names that the program exports for its modules, and by what is around it. A program that has it elsewhere, or
//! no more, is used as it is.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use object::{Object, ObjectSegment, ObjectSymbol};

/// The function that holds the store.
const VMRUN: &str = "helper_vmrun";
/// The function that delivers the interrupt, which it calls once.
const DELIVER: &str = "do_interrupt_x86_hardirq";

/// A store of a register at `[register + 32-bit displacement]` without prefix: opcode, ModRM, displacement.
const STORE: usize = 6;
/// An instruction of that length that does nothing (Intel SDM 2B, NOP). After a REX prefix it is one, too.
const NOTHING: [u8; STORE] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];
/// How far before the call the store can be.
const NEAR: usize = 64;

/// The emulator of the Debian root, mended; the root's own where there is nothing to mend that is known here.
///
/// # Errors
///
/// Those of reading and writing the program.
pub(crate) fn mended(root: &Path) -> Result<PathBuf> {
    let original = root.join("usr/bin/qemu-system-x86_64");
    let name = root.file_name().context("the root is a folder")?;
    let name = name.to_string_lossy().replace("root", "emulator");
    let copy = root.with_file_name(name);
    if copy.exists() {
        return Ok(copy);
    }
    let mut program =
        fs::read(&original).with_context(|| format!("cannot read {}", original.display()))?;
    let store = match store(&program) {
        Ok(store) => store,
        Err(error) => {
            eprintln!(
                "lab: {} is used as it is, and can deliver interrupts twice (docs/lab.md): {error:#}",
                original.display()
            );
            return Ok(original);
        }
    };
    program
        .get_mut(store)
        .context("the store is in the program")?
        .copy_from_slice(&NOTHING);
    // Another process can be at the same; each puts a whole file there.
    let partial = copy.with_extension(std::process::id().to_string());
    fs::write(&partial, &program)
        .and_then(|()| fs::set_permissions(&partial, fs::metadata(&original)?.permissions()))
        .and_then(|()| fs::rename(&partial, &copy))
        .with_context(|| format!("cannot write {}", copy.display()))?;
    Ok(copy)
}

/// Where the store is in the program's file.
fn store(program: &[u8]) -> Result<Range<usize>> {
    let file = object::File::parse(program)?;
    let symbol = |name| {
        file.dynamic_symbols()
            .find(|symbol| symbol.name() == Ok(name))
            .with_context(|| format!("it exports no {name}"))
    };
    let vmrun = symbol(VMRUN)?;
    let offset = file
        .segments()
        .find_map(|segment| {
            let within = vmrun.address().checked_sub(segment.address())?;
            let (start, length) = segment.file_range();
            (within < length).then_some(start + within)
        })
        .context("its code is in no segment")?;
    let offset = usize::try_from(offset)?;
    let end = offset.saturating_add(usize::try_from(vmrun.size())?);
    let code = program.get(offset..end).context("its code is not in it")?;
    let deliver = symbol(DELIVER)?.address().wrapping_sub(vmrun.address());
    let found = store_in(code, deliver)?;
    Ok(offset + found.start..offset + found.end)
}

/// Where the store is in the code of the function, whose call is to an address relative to the function's own.
fn store_in(code: &[u8], deliver: u64) -> Result<Range<usize>> {
    // mov DWORD PTR [register + displacement], 2: an NMI's vector, which goes to the same field.
    let nmi = only(code, 10, "store of an NMI's vector", |_, bytes| {
        bytes[0] == 0xc7 && bytes[1] & 0xf8 == 0x80 && bytes[6..] == [2, 0, 0, 0]
    })?;
    let field = &code[nmi..][1..STORE];
    let call = only(code, 5, "call that delivers", |at, bytes| {
        let relative = i32::from_le_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        let target = (at as u64 + 5).wrapping_add_signed(i64::from(relative));
        bytes[0] == 0xe8 && target == deliver
    })?;
    let before = call.saturating_sub(NEAR);
    let found = only(
        &code[before..call],
        STORE,
        "store before the call",
        |_, bytes| {
            // mov DWORD PTR [register + displacement], register: the same but for the source, in ModRM's bits 3 to 5.
            bytes[0] == 0x89 && bytes[1] & 0xc7 == field[0] && bytes[2..] == field[1..]
        },
    )?;
    Ok(before + found..before + found + STORE)
}

/// Where the one run of bytes of this length is that is wanted.
fn only(
    code: &[u8],
    length: usize,
    what: &str,
    wanted: impl Fn(usize, &[u8]) -> bool,
) -> Result<usize> {
    let mut found = code
        .windows(length)
        .enumerate()
        .filter(|(at, bytes)| wanted(*at, bytes))
        .map(|(at, _)| at);
    let first = found.next();
    ensure!(found.next().is_none(), "{VMRUN} has more than one {what}");
    match first {
        Some(at) => Ok(at),
        None => bail!("{VMRUN} has no {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The function's end as compilers make it: an NMI's store, the interrupt's, and a call to 0x100 after its start.
    fn code() -> Vec<u8> {
        let mut code = vec![0xc7, 0x83, 0x50, 0xc2, 0xff, 0xff, 2, 0, 0, 0];
        // mov [rbx+0x3480], r13d; mov [rbx-0x3db0], esi
        code.extend([0x44, 0x89, 0xab, 0x80, 0x34, 0, 0]);
        code.extend([0x89, 0xb3, 0x50, 0xc2, 0xff, 0xff]);
        let relative = 0x100_i32 - (i32::try_from(code.len()).unwrap() + 5);
        code.push(0xe8);
        code.extend(relative.to_le_bytes());
        code
    }

    #[test]
    fn the_store_is_found_by_what_is_around_it() {
        assert_eq!(store_in(&code(), 0x100).unwrap(), 17..23);
    }

    #[test]
    fn code_that_has_no_such_store_or_several_is_left_alone() {
        let without = store_in(&code()[10..], 0x100).unwrap_err().to_string();
        assert_eq!(without, "helper_vmrun has no store of an NMI's vector");
        let mut elsewhere = code();
        elsewhere[19] = 0x54;
        let error = store_in(&elsewhere, 0x100).unwrap_err().to_string();
        assert_eq!(error, "helper_vmrun has no store before the call");
        let error = store_in(&code(), 0x104).unwrap_err().to_string();
        assert_eq!(error, "helper_vmrun has no call that delivers");
        let mut twice = code();
        twice.extend(code());
        let error = store_in(&twice, 0x100).unwrap_err().to_string();
        assert_eq!(
            error,
            "helper_vmrun has more than one store of an NMI's vector"
        );
    }
}
