//! The API's own description, at `/openapi.json`.

use axum::Json;
use utoipa::OpenApi;

/// The description, gathered from the handlers.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Weft control API",
        description = "Any lead answers; changes go through the leader."
    ),
    paths(
        super::applications,
        super::apply,
        super::remove,
        super::services,
        super::bindings,
        super::clusters,
        super::nodes,
        super::migrations,
        super::migrate,
        super::explain,
        super::status
    )
)]
struct Description;

pub(super) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Description::openapi())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_described() {
        let paths = Description::openapi().paths.paths;
        let paths: Vec<&str> = paths.keys().map(String::as_str).collect();
        assert_eq!(
            paths,
            [
                "/v1/applications",
                "/v1/applications/{namespace}/{name}",
                "/v1/bindings",
                "/v1/clusters",
                "/v1/explain/{namespace}/{application}/{service}",
                "/v1/migrations",
                "/v1/nodes",
                "/v1/services",
                "/v1/status",
            ]
        );
    }
}
