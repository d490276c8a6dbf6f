use super::*;
use crate::admin::client;
use crate::admin::{Answer, AtRisk, Request};
use crate::config::Config;
use parking_lot::Mutex;
use std::path::Path;
use tokio::sync::oneshot;

struct Fake {
    at_risk: AtRisk,
    unmount: Mutex<Option<oneshot::Sender<()>>>,
    stops: Mutex<u32>,
}

#[async_trait]
impl AdminApi for Fake {
    async fn flush(&self, _: FlushRequest, _: &Progress) -> Result<FlushReport, AdminError> {
        Ok(FlushReport::default())
    }
    async fn gc(
        &self,
        what: crate::admin::gc::GcRequest,
        _progress: &Progress,
    ) -> Result<crate::admin::gc::GcReport, AdminError> {
        Ok(crate::admin::gc::GcReport { dry_run: what.dry_run, ..Default::default() })
    }

    async fn status(&self) -> Status {
        Status::default()
    }
    async fn metrics(&self) -> String {
        String::new()
    }
    async fn stop(&self, progress: &Progress) -> Result<StopReport, AdminError> {
        progress.say("flushing");
        *self.stops.lock() += 1;
        if let Some(unmount) = self.unmount.lock().take() {
            let _ = unmount.send(());
        }
        Ok(StopReport { at_risk: self.at_risk, ..StopReport::default() })
    }
}

fn settings(dir: &Path) -> Settings {
    let dir = dir.canonicalize().unwrap();
    for sub in ["m", "state"] {
        std::fs::create_dir(dir.join(sub)).unwrap();
    }
    Config {
        store: Some(format!("file://{}/store", dir.display())),
        mountpoint: Some(dir.join("m")),
        state_dir: Some(dir.join("state")),
        ..Config::default()
    }
    .resolve()
    .unwrap()
}

/// Runs a mount over a fake while `during` does something to it.
async fn live(
    at_risk: AtRisk,
    during: impl FnOnce(Settings, oneshot::Sender<()>) + Send + 'static,
) -> (Result<(), Failure>, u32) {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path());
    let (admin, by_admin) = oneshot::channel();
    let (kernel, by_kernel) = oneshot::channel();
    let fake = Arc::new(Fake { at_risk, unmount: Mutex::new(Some(admin)), stops: Mutex::new(0) });
    let gone = Box::pin(async move {
        tokio::select! { _ = by_admin => (), _ = by_kernel => () }
    });
    let live = Live { api: fake.clone(), gone };
    let for_thread = settings.clone();
    let thread = std::thread::spawn(move || during(for_thread, kernel));
    let run = dir.path().join("run");
    let result = attend(&run, &settings, live, Signals::new().unwrap(), true).await;
    tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap();
    assert!(!settings.admin_socket.exists(), "the socket is left behind");
    assert_eq!(std::fs::read_dir(&run).unwrap().count(), 0, "the registration is left behind");
    let stops = *fake.stops.lock();
    (result, stops)
}

fn wait_for(socket: &Path) {
    for _ in 0..500 {
        if client::call(socket, &Request::Status, &mut |_| {}).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("no answer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_admin_stops_it() {
    let (result, stops) = live(AtRisk::default(), |settings, kernel| {
        wait_for(&settings.admin_socket);
        let patience = Duration::from_millis(50);
        let answer = client::stop(&settings.admin_socket, patience, &mut |_| {}).unwrap();
        assert!(matches!(answer, Answer::Stop(r) if r.at_risk.nothing()));
        drop(kernel);
    })
    .await;
    result.unwrap();
    assert_eq!(stops, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kernel_unmounts_it_and_something_is_at_risk() {
    let risk = AtRisk { users: 2, oldest_age: Some(90), ..AtRisk::default() };
    let (result, stops) = live(risk, |settings, kernel| {
        wait_for(&settings.admin_socket);
        kernel.send(()).unwrap();
    })
    .await;
    let failure = result.unwrap_err();
    assert_eq!(failure.code, Code::TempFail);
    assert!(
        failure.text.contains("important changes of 2 users (0B), the oldest 1min old"),
        "{failure}"
    );
    assert_eq!(stops, 1);
}
