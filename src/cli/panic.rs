//! A panic is a bug of Busway's: it ends the process, whichever thread it is on, with a word for the
//! person who meets it.

use std::any::Any;
use std::panic::{self, PanicHookInfo};
use std::process;

use super::logging;
use crate::exit::RUNTIME;

/// Makes every panic the end of the process, with the status of a runtime failure.
///
/// A VM of which one thread is gone would hang; the kernel takes back all that it had. Who must put
/// something right before (the terminal) sets a hook of its own that calls the one it finds.
pub(super) fn exit_on_any() {
    panic::set_hook(Box::new(|info| {
        logging::last_words(&message(info));
        process::exit(i32::from(RUNTIME));
    }));
}

fn message(info: &PanicHookInfo<'_>) -> String {
    let place = info
        .location()
        .map(|place| format!(" ({place})"))
        .unwrap_or_default();
    format!(
        "busway: error: this is a bug in Busway {}: {}{place}\n",
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;
    use std::process::Command;
    use std::thread;

    /// Set in the process that is to panic.
    const CHILD: &str = "BUSWAY_TEST_PANIC";

    #[test]
    fn a_panic_on_any_thread_ends_the_process() {
        if env::var_os(CHILD).is_some() {
            exit_on_any();
            let _never = thread::spawn(|| panic!("out of tea")).join();
            process::exit(0);
        }
        let this = "cli::panic::tests::a_panic_on_any_thread_ends_the_process";
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", this, "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let stderr = String::from_utf8(output.stderr).unwrap();
        let expected = format!(
            "busway: error: this is a bug in Busway {}: out of tea (src/cli/panic.rs:",
            env!("CARGO_PKG_VERSION")
        );
        assert!(stderr.starts_with(&expected), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}
