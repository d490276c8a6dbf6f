//! Every request says why it is made: at the end of its `User-Agent`, which servers write to their
//! access logs.
//!
//! That header and no other: signatures leave it out, so no proxy that changes it breaks a request, and
//! no server finds a header that it does not know. For the same reason it is added last, after signing.

use super::Reason;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::BeforeTransmitInterceptorContextMut;

tokio::task_local! {
    static WHY: Reason;
}

/// Runs a call whose requests, all of this task's, say why.
pub(super) async fn said<T>(why: Reason, call: impl Future<Output = T>) -> T {
    WHY.scope(why, call).await
}

/// Adds it. The SDK has no place for it in its calls, so it comes with the task.
#[derive(Debug)]
pub(super) struct SayWhy;

impl Intercept for SayWhy {
    fn name(&self) -> &'static str {
        "SayWhy"
    }

    fn modify_before_transmit(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Ok(why) = WHY.try_with(|why| why.0) else { return Ok(()) };
        let headers = context.request_mut().headers_mut();
        let agent = headers.get("user-agent").unwrap_or_default();
        let agent = format!("{agent} vmailfs/{} reason/{why}", env!("CARGO_PKG_VERSION"));
        headers.insert("user-agent", agent.trim_start().to_owned());
        Ok(())
    }
}
