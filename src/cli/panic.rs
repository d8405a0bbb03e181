//! A panic is a bug of Busway's: it ends the process, whichever thread it is on, with a word for the
//! person who meets it.

use std::any::Any;
use std::io::{self, Write as _};
use std::panic::{self, PanicHookInfo};
use std::process;

use super::failure::RUNTIME;

/// Makes every panic the end of the process, with the status of a runtime failure.
///
/// A VM of which one thread is gone would hang; the kernel takes back all that it had. Who must put
/// something right before (the terminal) sets a hook of its own that calls the one it finds.
pub(super) fn exit_on_any() {
    panic::set_hook(Box::new(|info| {
        let _unread = io::stderr().write_all(message(info).as_bytes());
        process::exit(i32::from(RUNTIME));
    }));
}

fn message(info: &PanicHookInfo<'_>) -> String {
    let place = info
        .location()
        .map(|place| format!(" ({place})"))
        .unwrap_or_default();
    format!(
        "busway: error: this is a bug in Busway {}: {}{place}\r\n",
        env!("CARGO_PKG_VERSION"),
        payload(info.payload())
    )
}

fn payload(payload: &dyn Any) -> &str {
    payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without words")
}
