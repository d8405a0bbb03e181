//! Where a trial's time goes: booting its hosts, booting its guests, and of the rest what its emulated hosts worked
//! for and what it only waited for.
//!
//! A [`Meter`] belongs to one trial. [`Host`](crate::Host) and [`GuestRun`](crate::GuestRun) report to the meter that
//! their thread has entered; a thread that a trial starts enters the same one by [`current`]. What a run reports
//! without a meter is lost, at no cost.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::transcript::{EXEC, UP};

/// How often a meter looks at the emulators and the guests.
const PERIOD: Duration = Duration::from_millis(200);

/// The part of one processor that an emulator uses at least while its host works. Timers of an idle host take less.
const WORKS: f64 = 0.2;

/// Where a trial's seconds went. The first four add up to all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    /// Seconds in which a host booted.
    pub host: f64,
    /// Seconds in which no host and at least one guest booted: from the VMM's start to the guest's first program, or
    /// to the guest's end where that comes first. Later boots of a guest that restarts count as work.
    pub guests: f64,
    /// Seconds of the rest in which an emulated host used a fifth of a processor or more, or there was none.
    pub working: f64,
    /// Seconds of the rest in which the emulated hosts used less.
    pub waiting: f64,
    /// Seconds of processor time that the emulators used.
    pub emulator: f64,
    /// Hosts that were booted.
    pub host_boots: u32,
    /// Guests that were started.
    pub guest_boots: u32,
}

impl Spent {
    /// The sum of two.
    pub fn and(self, other: Self) -> Self {
        Self {
            host: self.host + other.host,
            guests: self.guests + other.guests,
            working: self.working + other.working,
            waiting: self.waiting + other.waiting,
            emulator: self.emulator + other.emulator,
            host_boots: self.host_boots + other.host_boots,
            guest_boots: self.guest_boots + other.guest_boots,
        }
    }
}

/// A guest that may be booting, as its console on this machine shows.
#[derive(Debug)]
struct Guest {
    console: PathBuf,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// The VMM has not been started: the host still puts the guest's files together.
    Prepared,
    Booting,
    Up,
}

impl Stage {
    fn of(console: &str) -> Self {
        let has = |words: &str| console.lines().any(|line| line.contains(words));
        match (has(UP), has(EXEC)) {
            (true, _) => Self::Up,
            (false, true) => Self::Booting,
            (false, false) => Self::Prepared,
        }
    }
}

/// Attributes each interval between two looks to one cause.
#[derive(Debug)]
struct State {
    spent: Spent,
    since: Instant,
    hosts_booting: u32,
    next_guest: u64,
    guests: BTreeMap<u64, Guest>,
    /// Processor seconds of each emulator, by its process, when it was last looked at.
    emulators: BTreeMap<u32, f64>,
    ended: bool,
}

impl State {
    fn new() -> Self {
        Self {
            spent: Spent::default(),
            since: Instant::now(),
            hosts_booting: 0,
            next_guest: 0,
            guests: BTreeMap::new(),
            emulators: BTreeMap::new(),
            ended: false,
        }
    }

    /// Attributes the time since the last look.
    fn look(&mut self) {
        let now = Instant::now();
        let seconds = now.duration_since(self.since).as_secs_f64();
        self.since = now;
        let there = !self.emulators.is_empty();
        let mut used = 0.0;
        self.emulators.retain(|&process, before| {
            let Some(after) = processor_seconds(process) else {
                return false;
            };
            used += after - *before;
            *before = after;
            true
        });
        self.spent.emulator += used;
        let booting = |guest: &Guest| guest.stage == Stage::Booting;
        *if self.hosts_booting > 0 {
            &mut self.spent.host
        } else if self.guests.values().any(booting) {
            &mut self.spent.guests
        } else if there && used < WORKS * seconds {
            &mut self.spent.waiting
        } else {
            &mut self.spent.working
        } += seconds;
        for guest in self.guests.values_mut() {
            if guest.stage != Stage::Up {
                let bytes = fs::read(&guest.console).unwrap_or_default();
                let seen = Stage::of(&String::from_utf8_lossy(&bytes));
                guest.stage = guest.stage.max(seen);
            }
        }
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    ended: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attributes the time until now before something changes.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        state.look();
        change(&mut state)
    }

    fn watch(&self) {
        let mut state = self.state();
        while !state.ended {
            state = match self.ended.wait_timeout(state, PERIOD) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
            state.look();
        }
    }
}

/// The account of one trial's time.
#[derive(Debug, Clone)]
pub struct Meter(Arc<Shared>);

thread_local! {
    static CURRENT: RefCell<Option<Meter>> = const { RefCell::new(None) };
}

/// The meter that this thread has entered, for a thread that it starts.
pub fn current() -> Option<Meter> {
    CURRENT.with_borrow(Clone::clone)
}

/// While it lives, what this thread does is on a meter's account.
#[derive(Debug)]
pub struct Entered(Option<Meter>);

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

impl Meter {
    /// Begins an account.
    pub fn start() -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new()),
            ended: Condvar::new(),
        });
        let watched = Arc::clone(&shared);
        thread::spawn(move || watched.watch());
        Self(shared)
    }

    /// Has this thread's boots counted here.
    pub fn enter(&self) -> Entered {
        Entered(CURRENT.replace(Some(self.clone())))
    }

    /// Ends the account.
    pub fn stop(self) -> Spent {
        let spent = self.0.change(|state| {
            state.ended = true;
            state.spent
        });
        self.0.ended.notify_all();
        spent
    }
}

/// A host that boots, until it is dropped.
#[derive(Debug)]
pub(crate) struct HostBoot(Option<Meter>);

/// Begins the boot of a host.
pub(crate) fn host_boots() -> HostBoot {
    let meter = current();
    if let Some(Meter(shared)) = &meter {
        shared.change(|state| {
            state.hosts_booting += 1;
            state.spent.host_boots += 1;
        });
    }
    HostBoot(meter)
}

impl Drop for HostBoot {
    fn drop(&mut self) {
        if let Some(Meter(shared)) = &self.0 {
            shared.change(|state| state.hosts_booting -= 1);
        }
    }
}

/// Counts an emulator's processor time from now on, until it is gone. For one that is known this changes nothing.
pub(crate) fn emulator(process: u32) {
    if let Some(Meter(shared)) = current() {
        shared.change(|state| {
            let before = processor_seconds(process).unwrap_or_default();
            state.emulators.entry(process).or_insert(before);
        });
    }
}

/// A guest that boots, or runs, until it is dropped.
#[derive(Debug)]
pub(crate) struct GuestBoot {
    number: u64,
    meter: Weak<Shared>,
}

/// Begins the account of a guest whose console goes to this file.
pub(crate) fn guest_boots(console: &Path) -> GuestBoot {
    let Some(Meter(shared)) = current() else {
        return GuestBoot {
            number: 0,
            meter: Weak::new(),
        };
    };
    let number = shared.change(|state| {
        let guest = Guest {
            console: console.to_owned(),
            stage: Stage::Prepared,
        };
        state.guests.insert(state.next_guest, guest);
        state.next_guest += 1;
        state.spent.guest_boots += 1;
        state.next_guest - 1
    });
    GuestBoot {
        number,
        meter: Arc::downgrade(&shared),
    }
}

impl Drop for GuestBoot {
    fn drop(&mut self) {
        if let Some(shared) = self.meter.upgrade() {
            shared.change(|state| state.guests.remove(&self.number));
        }
    }
}

/// The processor time that a process has used, in seconds; nothing if it is gone.
fn processor_seconds(process: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // SAFETY: takes a number only.
    let frequency = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Some(ticks(&stat)? as f64 / frequency.max(1) as f64)
}

/// A time that is measured as a machine with nothing else to do would take it: what the busiest thread of a process, such as
/// an emulator, waits meanwhile for others to leave it a processor does not count.
#[derive(Debug)]
pub struct Undisturbed {
    process: u32,
    began: Instant,
    /// By thread, how long it had run and waited then, in nanoseconds.
    threads: BTreeMap<u32, [u64; 2]>,
}

impl Undisturbed {
    /// Begins now.
    pub fn start(process: u32) -> Self {
        Self {
            process,
            began: Instant::now(),
            threads: run_and_waited(process),
        }
    }

    /// Since then.
    pub fn elapsed(&self) -> Duration {
        let waited = run_and_waited(self.process)
            .into_iter()
            .map(|(thread, now)| {
                let before = self.threads.get(&thread).copied().unwrap_or_default();
                let [run, waited] = [0, 1].map(|of: usize| now[of].saturating_sub(before[of]));
                (run, waited)
            });
        let waited = waited.max().map_or(0, |(_, waited)| waited);
        self.began
            .elapsed()
            .saturating_sub(Duration::from_nanos(waited))
    }
}

/// Linux Documentation/scheduler/sched-stats.rst, `/proc/<pid>/schedstat`, of each thread.
fn run_and_waited(process: u32) -> BTreeMap<u32, [u64; 2]> {
    let tasks = fs::read_dir(format!("/proc/{process}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let one = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let mut words = text.split_ascii_whitespace();
        let mut next = || words.next()?.parse().ok();
        let thread = task.file_name().to_str()?.parse().ok()?;
        Some((thread, [next()?, next()?]))
    };
    tasks.filter_map(one).collect()
}

/// `utime` and `stime`. proc_pid_stat(5): after the name in parentheses, the 12th and 13th words.
fn ticks(stat: &str) -> Option<u64> {
    let (_, words) = stat.rsplit_once(") ")?;
    let mut words = words.split_ascii_whitespace().skip(11);
    let mut next = || words.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ticks_are_those_behind_a_name_with_spaces_and_parentheses() {
        let stat = "7 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 120 30 0 0 20 0 5 0 1 2 3";
        assert_eq!(ticks(stat), Some(150));
        assert_eq!(ticks("7 (a) S 1 2"), None);
    }

    #[test]
    fn a_guest_boots_from_its_vmm_s_start_to_its_first_program() {
        assert_eq!(Stage::of(""), Stage::Prepared);
        assert_eq!(Stage::of("10.5 @@exec\n11 [ 0.1] Linux"), Stage::Booting);
        assert_eq!(Stage::of("10.5 @@exec\n12.25 @@up\n"), Stage::Up);
    }

    #[test]
    fn each_second_has_one_cause() {
        let began = Instant::now();
        let meter = Meter::start();
        let entered = meter.enter();
        let boot = host_boots();
        let guest = guest_boots(Path::new("/nowhere"));
        drop(boot);
        // This process stands for an emulator that does nothing.
        emulator(std::process::id());
        emulator(std::process::id());
        drop(guest);
        drop(entered);
        let spent = meter.stop();
        assert!(current().is_none());
        assert_eq!((spent.host_boots, spent.guest_boots), (1, 1));
        let sum = spent.host + spent.guests + spent.working + spent.waiting;
        assert!(spent.host > 0.0 && sum <= began.elapsed().as_secs_f64());
    }

    #[test]
    fn a_guest_that_boots_after_its_host_is_no_work() {
        let mut state = State::new();
        state.guests.insert(
            0,
            Guest {
                console: PathBuf::from("/nowhere"),
                stage: Stage::Booting,
            },
        );
        state.hosts_booting = 1;
        state.look();
        let host = state.spent.host;
        state.hosts_booting = 0;
        state.look();
        assert!(state.spent.guests > 0.0);
        assert_eq!(state.spent.host, host);
        assert_eq!(state.spent.working, 0.0);
    }

    #[test]
    fn an_emulator_that_is_gone_or_busy_is_not_waited_for() {
        let mut state = State::new();
        state.look();
        assert!(state.spent.working > 0.0, "there is no emulator");
        let working = state.spent.working;
        let own = std::process::id();
        let now = processor_seconds(own).unwrap();
        state.emulators.insert(own, now);
        state.look();
        assert!(state.spent.waiting > 0.0 || state.spent.emulator > 0.0);
        state.emulators.insert(own, now - 1.0);
        state.look();
        assert!(state.spent.working > working);
        assert!(state.spent.emulator >= 1.0);
    }
}
