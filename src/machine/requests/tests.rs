//! Requests that wait, are answered once, and hear of the end.

use std::thread;

use super::*;

#[test]
fn each_request_is_answered_once_and_in_order() {
    let requests = Requests::new().unwrap();
    let control = requests.control();
    let first = control.send(Request::Pause).unwrap();
    let second = control.send(Request::Info).unwrap();
    let (one, asker) = requests.take().unwrap();
    assert_eq!((one, requests.count()), (Request::Pause, 1));
    asker.answer(Ok(Answer::Done));
    let (two, asker) = requests.take().unwrap();
    assert_eq!(two, Request::Info);
    asker.answer(Err(RequestError::State("paused")));
    assert_eq!(first.recv(), Ok(Ok(Answer::Done)));
    assert_eq!(second.recv(), Ok(Err(RequestError::State("paused"))));
    assert!(requests.take().is_none());
}

#[test]
fn whatever_is_under_way_who_asks_how_it_is_is_answered_and_who_wants_the_end_is_kept() {
    let requests = Requests::new().unwrap();
    let control = requests.control();
    let pause = control.send(Request::Pause).unwrap();
    let info = control.send(Request::Info).unwrap();
    let config = VmConfig {
        cmdline: Some("quiet".into()),
        ..VmConfig::default()
    };
    let how = || Info::of(&config, State::Created);
    assert!(!requests.attend(how));
    assert_eq!(info.recv(), Ok(Ok(Answer::Info(Box::new(how())))));
    let ends = [Extent::Definition, Extent::Vm, Extent::Process]
        .map(|extent| control.send(Request::End(extent)).unwrap());
    let again = control.send(Request::Resume).unwrap();
    assert!(requests.attend(how));
    assert_eq!(requests.extent(), Some(Extent::Process));
    // Who wants the process to end is told by its end, and the others when the VM's is over.
    let [definition, vm, process] = ends;
    assert!(process.recv().is_err());
    assert!(definition.try_recv().is_err() && vm.try_recv().is_err());
    requests.take_ending().finish();
    assert_eq!(
        (definition.recv(), vm.recv()),
        (Ok(Ok(Answer::Done)), Ok(Ok(Answer::Done)))
    );
    assert_eq!(requests.extent(), None);
    // The rest waits in its order.
    let (one, asker) = requests.take().unwrap();
    assert_eq!(one, Request::Pause);
    asker.answer(Ok(Answer::Done));
    let (two, _asker) = requests.take().unwrap();
    assert_eq!(two, Request::Resume);
    assert!(pause.recv().is_ok() && again.try_recv().is_err());
}

#[test]
fn whoever_waits_or_comes_later_is_told_of_the_end() {
    let requests = Requests::new().unwrap();
    let control = requests.control();
    let taken = control.send(Request::Pause).unwrap();
    let (_, asker) = requests.take().unwrap();
    let waits = {
        let control = control.clone();
        thread::spawn(move || control.ask(Request::Info))
    };
    while requests.count() == 0 {
        thread::yield_now();
    }
    drop(requests);
    drop(asker);
    assert_eq!(waits.join().unwrap(), Err(RequestError::Ended));
    assert!(taken.recv().is_err());
    assert_eq!(control.ask(Request::Info), Err(RequestError::Ended));
}

#[test]
fn who_asks_how_it_is_after_the_end_is_told_the_last_word() {
    let requests = Requests::new().unwrap();
    let control = requests.control();
    let last = Info::of(&VmConfig::default(), State::Shutdown);
    requests.close(last.clone());
    let told = control.ask(Request::Info);
    assert_eq!(told, Ok(Answer::Info(Box::new(last))));
    assert_eq!(control.ask(Request::Pause), Err(RequestError::Ended));
}

#[test]
fn no_more_wait_than_fit() {
    let requests = Requests::new().unwrap();
    let control = requests.control();
    let kept: Vec<_> = (0..MOST).map(|_| control.send(Request::Info)).collect();
    assert!(kept.iter().all(Result::is_ok));
    assert_eq!(
        control.send(Request::Info).unwrap_err(),
        RequestError::TooMany
    );
}
