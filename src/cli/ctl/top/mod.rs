//! `ctl top`: what a VM does, live.

mod rates;
#[cfg(test)]
mod tests;
mod view;

use std::io::{self, IsTerminal as _, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use busway_iommu::printable;
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cli::failure::Failure;
use crate::cli::style::Screen;
use crate::cli::text::fit;
use crate::control::client::{self, ClientError};
use crate::devices::terminal::RawMode;
use crate::exit::RUNTIME;
use crate::machine::Signals;
use rates::{Doing, Look};

/// How long the VM has to answer a look that others follow. Ctrl-C waits as long.
const LIMIT: Duration = Duration::from_secs(2);

/// xterm: the other screen, without a cursor; and what was there before. ECMA-48, DECTCEM
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// ECMA-48: the cursor goes home (CUP), and everything after it is erased (ED).
const CLEAR: &str = "\x1b[H\x1b[J";

/// `busway ctl top`
#[derive(Args, Clone, Debug, PartialEq)]
pub(super) struct TopArgs {
    /// Look twice, show what was between, and end
    #[arg(long)]
    once: bool,
    /// How many seconds are between two looks, 0.1 to 3600
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    interval: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "it is no number".to_owned())?;
    match (0.1..=3600.0).contains(&seconds) {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err("0.1 to 3600 seconds can be between two looks".to_owned()),
    }
}

/// Why it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Once was asked for, or whoever reads has seen enough.
    Enough,
    /// `q`, Ctrl-C, or another signal that ends.
    Asked,
    /// There is no VM any more.
    Gone,
    /// It does not answer in time, and nobody looks again.
    Silent,
}

/// What becomes of a look.
enum Looked {
    At(Look),
    /// It does not answer in time.
    Silent,
    Gone,
}

/// Shows what the VM behind `socket` does, until somebody has seen enough.
pub(super) fn run(socket: &Path, args: &TopArgs, json: bool) -> Result<(), Failure> {
    let signals = Signals::new().map_err(|error| Failure::new(RUNTIME, error))?;
    let stdout = io::stdout();
    let live = stdout.is_terminal() && !args.once && !json;
    let mut out = stdout.lock();
    let start = Instant::now();
    // Of one that is not asked again, as long as of any other request.
    let limit = if args.once { super::LIMIT } else { LIMIT };
    let mut look = || {
        let answer = client::ask(socket, "GET", "vm.activity", None, limit)?;
        Ok(Look {
            at: start.elapsed(),
            answer,
        })
    };
    // What is wrong with the socket is told on the terminal as it is.
    let failed = |error: ClientError| Failure::new(error.exit_status(), error);
    let first = look().map_err(failed)?;
    // Nobody presses keys where standard input is no terminal.
    let stdin = io::stdin();
    let by_keys = live
        .then(|| RawMode::enter_for_keys(stdin.as_fd()).ok())
        .flatten();
    let keys = by_keys.as_ref().map(|_| stdin.as_fd());
    let mut wait = || pause(&signals, keys, args.interval);
    let shown = Shown {
        socket: &printable(&socket.display().to_string()),
        once: args.once,
        json,
        live,
    };
    let end = {
        let mut terminal = Terminal::enter(&mut out, live)?;
        let mut look = || look_again(&mut look);
        let end = shown.watch(
            first,
            &mut look,
            &mut wait,
            Screen::of_stdout,
            &mut terminal,
        );
        end.context("cannot write the result")
            .map_err(|error| Failure::explained(RUNTIME, error))?
    };
    match end {
        End::Silent => Err(failed(ClientError::Silent {
            path: socket.to_owned(),
            limit,
        })),
        End::Gone if !json => {
            // By now the terminal is as it was.
            let _unread = writeln!(out, "the VM has ended");
            Ok(())
        }
        End::Enough | End::Asked | End::Gone => Ok(()),
    }
}

/// Waits; `false` where a signal ends it, or `q` among `keys`.
fn pause(signals: &Signals, keys: Option<BorrowedFd<'_>>, time: Duration) -> bool {
    let end = Instant::now() + time;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        let asked = PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN);
        let pressed = keys.map(|keys| PollFd::from_borrowed_fd(keys, PollFlags::IN));
        let mut sources: Vec<_> = [asked].into_iter().chain(pressed).collect();
        match poll(&mut sources, Some(&left)) {
            Ok(0) => return true,
            // Stopped, and continued.
            Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return false,
        }
        if signals.take().is_some() || keys.is_some_and(is_to_end) {
            return false;
        }
    }
}

/// Whether `q` was pressed, or there are no keys any more. It is asked for where there may be some.
fn is_to_end(keys: BorrowedFd<'_>) -> bool {
    let mut ready = [PollFd::from_borrowed_fd(keys, PollFlags::IN)];
    if poll(&mut ready, Some(&Timespec::default())) != Ok(1) {
        return false;
    }
    let mut pressed = [0; 64];
    match rustix::io::read(keys, &mut pressed) {
        Ok(0) => true,
        Ok(count) => pressed.iter().take(count).any(|key| *key == b'q'),
        Err(error) => error != rustix::io::Errno::INTR,
    }
}

fn look_again(look: &mut dyn FnMut() -> Result<Look, ClientError>) -> Looked {
    match look() {
        Ok(look) => Looked::At(look),
        Err(ClientError::Silent { .. }) => Looked::Silent,
        Err(_) => Looked::Gone,
    }
}

/// A terminal that is given back as it was, however this ends.
struct Terminal<'a> {
    out: &'a mut dyn Write,
    live: bool,
}

impl<'a> Terminal<'a> {
    fn enter(out: &'a mut dyn Write, live: bool) -> Result<Self, Failure> {
        if live {
            let entered = out.write_all(ENTER.as_bytes());
            entered
                .context("cannot write to the terminal")
                .map_err(|error| Failure::explained(RUNTIME, error))?;
        }
        Ok(Self { out, live })
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        if self.live {
            // Whoever closed it needs nothing back.
            let _closed = self.out.write_all(LEAVE.as_bytes());
            let _closed = self.out.flush();
        }
    }
}

/// How it is shown.
struct Shown<'a> {
    socket: &'a str,
    once: bool,
    json: bool,
    live: bool,
}

impl Shown<'_> {
    /// Looks and shows, until there is nothing more to be seen. `wait` lets time pass between two looks; `false` from
    /// it ends this.
    fn watch(
        &self,
        first: Look,
        look: &mut dyn FnMut() -> Looked,
        wait: &mut dyn FnMut() -> bool,
        screen: impl Fn() -> Screen,
        terminal: &mut Terminal<'_>,
    ) -> io::Result<End> {
        let lived = first.lives();
        let mut before = first;
        // Something is to be seen at once: nothing has happened yet.
        if self.live {
            self.write(&before, &Doing::default(), "", screen(), terminal)?;
        }
        let mut frames = 0_u64;
        loop {
            if !wait() {
                return Ok(End::Asked);
            }
            let now = match look() {
                Looked::At(now) if lived && !now.lives() => return Ok(End::Gone),
                Looked::At(now) => now,
                Looked::Silent if self.once => return Ok(End::Silent),
                Looked::Silent => {
                    let none = Doing::default();
                    let said = "the VM does not answer: what it did last\n";
                    self.write(&before, &none, said, screen(), terminal)?;
                    continue;
                }
                Looked::Gone => return Ok(End::Gone),
            };
            let doing = rates::between(&before, &now);
            if frames > 0 && !self.live && !self.json {
                // In a pipe an empty line tells one picture from the next.
                terminal.out.write_all(b"\n")?;
            }
            match self.write(&now, &doing, "", screen(), terminal) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(End::Enough),
                result => result?,
            }
            if self.once {
                return Ok(End::Enough);
            }
            frames += 1;
            before = now;
        }
    }

    fn write(
        &self,
        now: &Look,
        doing: &Doing,
        note: &str,
        screen: Screen,
        terminal: &mut Terminal<'_>,
    ) -> io::Result<()> {
        let text = match (self.json, self.once) {
            (true, true) => format!("{:#}\n", rates::json(now, doing)),
            (true, false) => format!("{}\n", rates::json(now, doing)),
            (false, _) => note.to_owned() + &view::show(self.socket, now, doing, screen),
        };
        let text = match screen.height.filter(|_| self.live) {
            Some(height) => {
                let fitting = fit(&text, height, "make the window higher");
                format!("{CLEAR}{fitting}")
            }
            None => text,
        };
        terminal.out.write_all(text.as_bytes())?;
        terminal.out.flush()
    }
}
