//! `--cpus core_scheduling=`: what may be on a core beside a vCPU. A host whose cores run several threads is the lab's, where
//! a trial runs these tests.

use std::collections::BTreeSet;
use std::thread;
use std::{env, fs};

use rustix::io::Errno;
use rustix::thread::{
    CoreSchedulingScope, Pid, core_scheduling_cookie, create_core_scheduling_cookie, gettid,
};
use serde_json::json;

use crate::bare::power_off;
use crate::served::{Served, eventually, lives};
use crate::whole::{Run, has_kvm, signal, stderr, wait_for_the_button};

const THREAD: CoreSchedulingScope = CoreSchedulingScope::Thread;
/// Says that this host's cores run several threads, and that its kernel has cookies for them.
const COOKIES: &str = "BUSWAY_TEST_COOKIES";

/// What this kernel does with a thread that is nobody else's: a host whose cores run one thread at a time has no cookies.
fn can() -> Result<(), Errno> {
    let can = thread::spawn(|| create_core_scheduling_cookie(gettid(), THREAD));
    let can = can.join().unwrap();
    assert!(can.is_ok() || env::var_os(COOKIES).is_none(), "{can:?}");
    can
}

/// The cookies of a process's vCPUs, and of all its other threads.
fn cookies(process: u32) -> (Vec<u64>, BTreeSet<u64>) {
    let (mut vcpus, mut others) = (Vec::new(), BTreeSet::new());
    for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let task = task.unwrap();
        let name = fs::read_to_string(task.path().join("comm"));
        let id = task.file_name().to_str().unwrap().parse().unwrap();
        let cookie = core_scheduling_cookie(Pid::from_raw(id).unwrap(), THREAD);
        match (name, cookie) {
            (Ok(name), Ok(cookie)) if name.starts_with("vcpu") => vcpus.push(cookie),
            (Ok(_), Ok(cookie)) => drop(others.insert(cookie)),
            // One that puts a VM together may have ended meanwhile.
            _ => {}
        }
    }
    (vcpus, others)
}

/// Whether a process whose VM has so many vCPUs has cookies as was asked. Its first thread never has one. What a vCPU has
/// started itself has that vCPU's, such as KVM's thread that splits huge pages.
fn has_cookies(process: u32, word: &str, count: usize) -> bool {
    let first = Pid::from_raw(process.cast_signed()).unwrap();
    assert_eq!(core_scheduling_cookie(first, THREAD), Ok(0));
    let (vcpus, others) = cookies(process);
    let distinct: BTreeSet<_> = vcpus.iter().copied().collect();
    vcpus.len() == count
        && match word {
            "vm" => distinct.len() == 1 && !distinct.contains(&0),
            "vcpu" => distinct.len() == count && !distinct.contains(&0),
            _ => distinct.union(&others).eq([&0]),
        }
}

#[test]
fn a_vms_threads_have_a_cookie_and_each_vcpu_its_own_where_asked_or_the_kernel_without_is_named() {
    if !has_kvm() {
        return;
    }
    let can = can();
    for word in ["vm", "vcpu", "off"] {
        let code = [wait_for_the_button(), power_off()].concat();
        let mut run = Run::new(&code);
        run.command
            .args(["--cpus", &format!("boot=2,core_scheduling={word}")]);
        if can == Err(Errno::INVAL) && word != "off" {
            let output = run.command.output().unwrap();
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(3), "{said}");
            for words in [&*format!("core_scheduling={word}"), "CONFIG_SCHED_CORE"] {
                assert!(said.contains(words), "{said}");
            }
            continue;
        }
        let Some((mut child, _folder)) = run.until("ready") else {
            return;
        };
        if can.is_ok() {
            let found = cookies(child.id());
            assert!(has_cookies(child.id(), word, 2), "{word}: {found:?}");
        }
        signal(&child, libc::SIGTERM);
        assert!(child.wait().unwrap().success(), "{word}");
    }
}

/// One process has one VM after the other, of which each is as it was asked for: none has the cookies of one before it, and
/// a vCPU that is plugged has what the others have.
#[test]
fn each_vm_of_a_process_is_kept_apart_as_it_was_asked_for_whatever_the_one_before_was() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let can = can();
    for (asked, word) in [
        ("Vm", "vm"),
        ("Off", "off"),
        ("Vcpu", "vcpu"),
        ("Off", "off"),
    ] {
        if can == Err(Errno::INVAL) && asked != "Off" {
            continue;
        }
        let mut vm = served.vm(&lives("boot"));
        vm["cpus"]["core_scheduling"] = json!(asked);
        assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
        assert_eq!(served.put("vm.boot"), 204);
        let (_, info) = served.ask("GET", "vm.info", None);
        assert_eq!(info["config"]["cpus"]["core_scheduling"], asked);
        if can.is_ok() {
            let found = cookies(served.pid());
            assert!(has_cookies(served.pid(), word, 2), "{word}: {found:?}");
        }
        let three = json!({ "desired_vcpus": 3 });
        assert_eq!(served.ask("PUT", "vm.resize", Some(&three)).0, 204);
        if can.is_ok() {
            eventually("the third vCPU's cookie", || {
                has_cookies(served.pid(), word, 3)
            });
        }
        assert_eq!(served.put("vm.delete"), 204);
        assert!(can.is_err() || cookies(served.pid()).1.iter().eq([&0]));
    }
}

#[test]
fn what_is_in_effect_is_shown_whether_it_was_asked_for_or_not() {
    let has_none = can() == Err(Errno::INVAL);
    for (asked, shown) in [
        (None, if has_none { "Off" } else { "Vm" }),
        (Some("Vm"), if has_none { "Off" } else { "Vm" }),
        (Some("Off"), "Off"),
        (Some("Vcpu"), "Vcpu"),
    ] {
        let Some(served) = Served::start(&[]) else {
            return;
        };
        let mut vm = served.vm(&lives("boot"));
        if let Some(asked) = asked {
            vm["cpus"]["core_scheduling"] = json!(asked);
        }
        assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
        let in_effect = || {
            let (_, mut info) = served.ask("GET", "vm.info", None);
            info["config"]["cpus"]["core_scheduling"].take()
        };
        // Nothing is in effect yet.
        assert_eq!(in_effect(), asked.unwrap_or("Vm"));
        let (status, said) = served.ask("PUT", "vm.boot", None);
        if has_none && asked == Some("Vcpu") {
            assert_eq!(status, 500, "{said}");
            continue;
        }
        assert_eq!(status, 204, "{said}");
        assert_eq!(in_effect(), shown, "{asked:?}");
    }
}
